"""A mechanism as timm's ``attn_layer=``."""

import copy

import pytest
import torch
from hosts import OPTIONS, TIMM_REASON, images, timm_vit
from torch import nn

from effvit import available_attention, swap_attention, timm_layer
from effvit.attention.hybrid import HybridAttention
from effvit.errors import UserError

GRID = {"grid_size": (4, 4), "prefix_tokens": 1}


def with_layer(name, place=GRID, **options):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason=TIMM_REASON)
    if "attn_layer" not in vision_transformer.VisionTransformer.__init__.__annotations__:
        pytest.skip("this timm has no attn_layer")
    layer = timm_layer(name, **place, **(options or OPTIONS.get(name, {})))
    return lambda **changes: timm_vit(attn_layer=layer, **changes)


@pytest.mark.parametrize("name", available_attention())
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "proj_bias": False, "scale_attn_norm": True}], ids=str)
def test_a_model_built_with_it_is_the_model_swapped(name, changes):
    built = with_layer(name)(**changes).eval()
    plain = timm_vit(**changes)
    swap_attention(plain, name, **OPTIONS.get(name, {}))
    plain.load_state_dict(built.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images()), built(images()), rtol=0, atol=1e-6)
    assert swap_attention(built, name, **OPTIONS.get(name, {})).new == []


def test_what_takes_any_number_of_tokens_needs_no_grid():
    model = with_layer("performer", place={})(dynamic_img_size=True)
    assert model(torch.randn(1, 3, 24, 20)).isfinite().all()


@pytest.mark.parametrize("mode", ["", "reset", "jax", "moco"])
def test_timms_initialisation_leaves_a_mechanism_its_start(mode):
    model = with_layer("hybrid", fusion="gate", value_conv=3)(weight_init=mode)
    attentions = [module for module in model.modules() if isinstance(module, HybridAttention)]
    model.init_weights()
    assert len(attentions) == 2 and not any(attention.gate.weight.any() for attention in attentions)
    assert all(0 < attention.value_conv.weight.std() < 0.03 for attention in attentions), "it starts small"


def test_dropout_and_biases_are_as_timm_says():
    model = with_layer("fused")(attn_drop_rate=0.25, proj_drop_rate=0.125, qkv_bias=False)
    attention = model.blocks[1].attn
    assert attention.qkv.bias is None and attention.proj.bias is not None
    assert (attention.dropout_p, attention.proj_drop.p) == (0.25, 0.125)


def test_blocks_are_counted_and_share_what_they_share():
    model = with_layer("linformer", GRID | {"depth": 2}, k=6, share="layers")()
    first, second = (block.attn for block in model.blocks)
    assert (first.layer, second.layer, second.depth) == (0, 1, 2)
    assert first.E is second.E
    again = copy.deepcopy(model)
    assert again.blocks[0].attn.E is again.blocks[1].attn.E is not first.E


def test_a_layer_has_the_precision_that_timm_asks_for():
    assert timm_layer("fused")(8, num_heads=2, dtype=torch.float64).proj.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: timm_layer("mean"), "attention='mean': unknown mechanism, expected one of .*"),
        (lambda: timm_layer(None), "attention=None: unknown mechanism, expected one of .*[a-z]"),
        (lambda: swap_attention(nn.Linear(1, 1), None), "attention=None: unknown mechanism, expected one of .*[a-z]"),
        (lambda: timm_layer("linformer", k=6), r"timm_layer: linformer needs grid_size=\(rows, columns\), the .*"),
        (lambda: timm_layer("linformer", **GRID, k=18), "attention.linformer.k=18: must be at most 17, the .*"),
        (lambda: timm_layer("fused", k=6), "attention.fused.k: unknown option, there are no options"),
        (lambda: timm_layer("fused")(8, 2, gated=True), "timm_layer: got gated, which the mechanisms have not"),
        (lambda: timm_layer("fused", depth=0), "timm_layer: depth=0: expected the model's number of blocks"),
        (lambda: timm_layer("fused", depth="2"), "timm_layer: depth='2': expected .*"),
        (lambda: timm_layer("fused", prefix_tokens=-1), "timm_layer: prefix_tokens=-1: expected a whole .*"),
        (lambda: timm_layer("linformer", grid_size=4), r"timm_layer: grid_size=4: expected \(rows, columns\), .*"),
        (lambda: timm_layer("hybrid", grid_size=(0, 4)), r"timm_layer: grid_size=\(0, 4\): expected .*"),
        (lambda: timm_layer("linformer", **GRID, k=6, share="layers"), "timm_layer: share='layers' needs depth=.*"),
        (lambda: timm_layer("fused")(8, 3), "num_heads=3: must divide the width 8"),
    ],
)
def test_bad_input_is_told_in_one_line(call, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        call()


def test_it_is_a_class_as_timm_expects():
    assert isinstance(timm_layer("fused"), type) and isinstance(timm_layer("fused")(8, 2), nn.Module)
