import pytest
import torch
from mechanisms import qkv_of
from torch.nn import functional as F

from effvit import build_attention, policy
from effvit.kernels import softmax_attention as module
from effvit.kernels.dispatch import qkv, softmax_attention

pytestmark = pytest.mark.slow


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
        return torch.cat(qkv(x, weight, bias), dim=-1)

    gradient = torch.randn(2, 5, 36, dtype=torch.float64)
    results = [(y, *torch.autograd.grad(y, inputs, gradient)) for y in (merged(x), parts(*inputs))]
    torch.testing.assert_close(*results)
    assert torch.autograd.gradgradcheck(parts, inputs)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: parts(x, w).sin().sum()), in_dims=(None, 0))
    expected = [torch.func.grad(lambda w, x=x: (x @ w.T).sin().sum())(merged.weight) for x in x.detach()]
    torch.testing.assert_close(per_sample(merged.weight.detach(), x.detach()), torch.stack(expected))


@pytest.mark.parametrize("compiled", [False, True])
def test_short_sequences_in_half_precision_are_trained_as_in_float32(compiled):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.bfloat16, requires_grad=True) for n in (9, 5, 5))
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    gradient = torch.randn(2, 3, 9, 4, dtype=torch.bfloat16)
    attend = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager") if compiled else softmax_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attend(q, k, v)
    expected = F.scaled_dot_product_attention(*exact)
    assert torch.equal(y, expected.bfloat16())
    actual = torch.autograd.grad(y, (q, k, v), gradient)
    for a, e in zip(actual, torch.autograd.grad(expected, exact, gradient.float()), strict=True):
        assert torch.equal(a, e.bfloat16())


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize(
    "rows, columns, trained", [(9, 9, False), (200, 200, True), (9, 1030, False), (1030, 9, False)]
)
def test_half_precision_is_torchs_own_where_float32_does_not_pay(rows, columns, trained, pays, monkeypatch):
    monkeypatch.setattr(policy, "LONG_ATTENTION_IN_FLOAT32", pays)
    torch.manual_seed(0)
    shapes = [(2, 3, rows, 4), (2, 3, columns, 4), (2, 3, columns, 4)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=trained) for shape in shapes)
    assert torch.equal(softmax_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples, at_once", [(0, 1), (5, 1), (5, 2), (5, 5)])
def test_long_sequences_in_half_precision_pass_in_float32_where_that_pays(dtype, samples, at_once, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(samples, 1030, 3, 4, dtype=dtype).transpose(1, 2) for _ in range(3))
    monkeypatch.setattr(module, "_COPIED_NUMBERS", at_once * 1030 * 3 * 4)
    monkeypatch.setattr(policy, "LONG_ATTENTION_IN_FLOAT32", True)
    with torch.autocast("cpu", dtype=dtype):
        y = softmax_attention(q, k, v)
    assert torch.equal(y, F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype))
    assert y.transpose(1, 2).is_contiguous()
    monkeypatch.setattr(policy, "LONG_ATTENTION_IN_FLOAT32", False)
    assert torch.equal(softmax_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
