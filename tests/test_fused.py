import torch
from mechanisms import qkv_of

from effvit import build_attention


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
