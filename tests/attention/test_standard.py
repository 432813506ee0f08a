import math

import pytest
import torch
from mechanisms import qkv_of

from effvit import ViT, ViTConfig, build_attention
from effvit.model.names import fused_to_standard, standard_to_fused


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return build_attention("standard", 12, 3, (2, 3))


def test_it_is_softmax_of_scores_scaled_by_the_heads_width_number_by_number(attention):
    x = torch.randn(2, 7, 12)
    y, matrix = attention(x, return_map=True)
    q, k, v = (tokens.tolist() for tokens in qkv_of(attention, x))
    mixed = torch.empty(2, 7, 12)
    for b in range(2):
        for h in range(3):
            for i in range(7):
                products = [dot(q[b][h][i], k[b][h][j]) for j in range(7)]
                scores = [math.exp(product / math.sqrt(4)) for product in products]
                weights = [score / sum(scores) for score in scores]
                torch.testing.assert_close(matrix[b, h, i], torch.tensor(weights))
                for c in range(4):
                    mixed[b, i, 4 * h + c] = sum(weights[j] * v[b][h][j][c] for j in range(7))
    torch.testing.assert_close(y, attention.proj(mixed))


def test_each_head_has_its_own_maps(attention):
    shapes = {key: tuple(tensor.shape) for key, tensor in attention.state_dict().items() if "heads.2." in key}
    assert shapes == {f"heads.2.{name}.weight": (4, 12) for name in ("query", "key", "value")} | {
        f"heads.2.{name}.bias": (4,) for name in ("query", "key", "value")
    }


@pytest.mark.parametrize("bias", [True, False])
def test_its_state_dict_goes_to_fused_and_back_without_loss(bias):
    standard = build_attention("standard", 24, 12, (2, 3), qkv_bias=bias)  # twelve heads: "10" sorts before "2"
    fused = build_attention("fused", 24, 12, (2, 3), qkv_bias=bias)
    state = standard.state_dict()
    fused.load_state_dict(standard_to_fused(state))
    back = fused_to_standard(fused.state_dict(), num_heads=12)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(fused(x), standard(x), rtol=1e-5, atol=1e-5)


def test_a_whole_model_converts_and_gives_the_same_logits():
    torch.manual_seed(0)
    config = {"image_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "initializer_range": 0.3}
    standard, fused = (ViT(ViTConfig(**config, attention=name)) for name in ("standard", "fused"))
    standard.load_state_dict(fused_to_standard(fused.state_dict(), num_heads=4))
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(standard(images), fused(images), rtol=1e-5, atol=1e-5)
    assert standard_to_fused(standard.state_dict()).keys() == fused.state_dict().keys()
