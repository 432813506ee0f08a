import pytest
import torch
from mechanisms import qkv_of

from effvit import build_attention
from effvit.attention.base import QKVMaps
from effvit.attention.fused import ShortAttention, suits_short


def test_it_is_softmax_attention_written_out():
    torch.manual_seed(0)
    attention = build_attention("fused", 12, 3, (3, 4)).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    q, k, v = qkv_of(attention, x)
    matrix = (q @ k.mT / 4**0.5).softmax(dim=-1)
    y, implied = attention(x, return_map=True)
    torch.testing.assert_close(implied, matrix)
    torch.testing.assert_close(y, attention.proj((matrix @ v).transpose(1, 2).flatten(2)))


def test_it_agrees_with_torchs_own_module():
    torch.manual_seed(0)
    attention = build_attention("fused", 12, 3, (3, 4))
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    state = attention.state_dict()
    theirs.load_state_dict(
        {
            "in_proj_weight": state["qkv.weight"],
            "in_proj_bias": state["qkv.bias"],
            "out_proj.weight": state["proj.weight"],
            "out_proj.bias": state["proj.bias"],
        }
    )
    x = torch.randn(2, 13, 12)
    y, matrix = attention(x, return_map=True)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(matrix, weights, rtol=1e-5, atol=1e-6)


def test_its_macs_are_quadratic_in_tokens_and_the_maps_linear():
    def macs(side):
        return build_attention("fused", 12, 3, (side, side)).macs()

    assert macs(2) == 4 * 5 * 12**2 + 2 * 5**2 * 12
    assert macs(8) == 4 * 65 * 12**2 + 2 * 65**2 * 12


@pytest.mark.parametrize("bias", [True, False])
def test_maps_in_three_parts_have_the_gradients_of_the_merged_one(bias):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    merged = torch.nn.Linear(12, 36, bias=bias, dtype=torch.float64)
    inputs = (x, *merged.parameters())

    def parts(x, weight, bias=None):
        return torch.cat(QKVMaps.apply(x, weight, bias), dim=-1)

    gradient = torch.randn(2, 5, 36, dtype=torch.float64)
    results = [(y, *torch.autograd.grad(y, inputs, gradient)) for y in (merged(x), parts(*inputs))]
    torch.testing.assert_close(*results)
    assert torch.autograd.gradgradcheck(parts, inputs)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: parts(x, w).sin().sum()), in_dims=(None, 0))
    expected = [torch.func.grad(lambda w, x=x: (x @ w.T).sin().sum())(merged.weight) for x in x.detach()]
    torch.testing.assert_close(per_sample(merged.weight.detach(), x.detach()), torch.stack(expected))


@pytest.mark.parametrize("shape", [(2, 3, 13, 4), (1, 1, 1, 1), (3, 2, 65, 12), (2, 4, 128, 16)])
@pytest.mark.parametrize("extra", [0, 5])
def test_short_attention_is_the_same_attention(shape, extra):
    torch.manual_seed(0)
    q, k = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(*shape[:-1], shape[-1] + extra, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(v)
    y, expected = ShortAttention.apply(q, k, v), (q @ k.mT * shape[-1] ** -0.5).softmax(dim=-1) @ v
    results = [(r, *torch.autograd.grad(r, (q, k, v), gradient)) for r in (y, expected)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_short_attention_passes_gradcheck_and_stays_finite_where_scores_are_huge():
    torch.manual_seed(0)
    tokens = [torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(ShortAttention.apply, tokens)
    q, k, v = (1e4 * torch.randn(2, 2, 5, 3) for _ in range(3))
    y = ShortAttention.apply(q.requires_grad_(), k, v)
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()


def test_it_is_for_short_sequences_of_narrow_heads_in_eager_training_on_a_cpu():
    def q(tokens=65, width=12):
        return torch.zeros(1, 1, tokens, width, requires_grad=True)

    assert suits_short(q()) and suits_short(q(128, 16))
    assert not suits_short(q(129)) and not suits_short(q(width=17)) and not suits_short(q().detach())
    with torch.no_grad():
        assert not suits_short(q())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not suits_short(q())
    assert not torch.compile(suits_short, fullgraph=True, backend="eager")(q())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_single_samples_still_come_from_a_map_over_them():
    torch.manual_seed(0)
    attention, x = build_attention("fused", 12, 3, (2, 2)).double(), torch.randn(4, 5, 12, dtype=torch.float64)
    one = torch.func.vmap(torch.func.grad(lambda sample: attention(sample[None]).square().sum()))(x)
    whole = torch.func.grad(lambda batch: attention(batch).square().sum())(x)
    torch.testing.assert_close(one, whole)
