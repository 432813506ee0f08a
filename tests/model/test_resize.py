"""A model, in place, for another image size."""

import copy

import pytest
import torch

from effvit import ViT, ViTConfig, available_attention, resize
from effvit.errors import UserError
from effvit.model.resize import resize_positions, resize_projection

OPTIONS = {"linformer": {"k": 6}, "nystromformer": {"num_landmarks": 5}, "hybrid": {"window_size": 2}}
OPTIONS |= {"agent": {"agent_size": 2}, "pooled": {"pool_size": 3}, "window": {"window_size": 2}}


def vit(name="fused", **changes):
    torch.manual_seed(0)
    fields = {"image_size": 16, "num_hidden_layers": 2, "num_classes": 7, "attention": name}
    model = ViT(ViTConfig(**(fields | {"attention_options": OPTIONS.get(name, {})} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", available_attention())
@pytest.mark.parametrize("prefix_tokens", [0, 1, 3])
@pytest.mark.parametrize("size", [24, (12, 20)])
@pytest.mark.slow
def test_a_resized_model_is_one_of_that_size_with_the_weights_carried_over(name, prefix_tokens, size):
    model = vit(name, prefix_tokens=prefix_tokens)
    expected = vit(name, prefix_tokens=prefix_tokens, image_size=size)
    weights = model.state_dict()
    grid = expected.config.grid_size
    weights["pos_embed"] = resize_positions(weights["pos_embed"], (4, 4), grid, prefix_tokens)
    for key in weights:
        if key.endswith((".E", ".F")):
            weights[key] = resize_projection(weights[key], (4, 4), grid, prefix_tokens)
    expected.load_state_dict(weights)
    assert resize(model, size) is model and model.config == expected.config
    images = torch.randn(2, 3, *expected.config.image_shape)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
    assert model.macs() == expected.macs()


@pytest.mark.parametrize("name", ["fused", "pooled", "window"])
def test_a_convolution_of_values_goes_over_the_new_grid(name):
    model, expected = (vit(name, value_conv=3, image_size=size) for size in (16, (12, 20)))
    weights = model.state_dict()
    weights["pos_embed"] = resize_positions(weights["pos_embed"], (4, 4), (3, 5))
    expected.load_state_dict(weights)
    images = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        assert torch.equal(resize(model, (12, 20))(images), expected(images))
    assert model.macs() == expected.macs() and model.config == expected.config


def test_positions_are_timms():
    layers = pytest.importorskip("timm.layers", reason="a peer: pip install effvit[peers]")
    model = vit(prefix_tokens=2)
    before = model.pos_embed.detach().clone()
    resize(model, (24, 40))
    expected = layers.resample_abs_pos_embed(before, [6, 10], num_prefix_tokens=2)
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=0, atol=1e-6)


def test_projections_are_to_each_channel_what_positions_are_but_bilinear_and_scaled():
    layers = pytest.importorskip("timm.layers", reason="a peer: pip install effvit[peers]")
    model = vit("linformer")
    before = model.blocks[1].attn.E.detach().clone()  # (k, N)
    resize(model, 24)
    as_positions = layers.resample_abs_pos_embed(
        before.T[None], [6, 6], num_prefix_tokens=1, interpolation="bilinear", antialias=False
    )
    torch.testing.assert_close(model.blocks[1].attn.E.detach(), as_positions[0].T * 17 / 37, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", ["kv", "layers"])
def test_what_was_shared_stays_shared(share):
    model = resize(vit("linformer", attention_options={"k": 6, "share": share}), 24)
    first, second = model.attentions()
    assert first.E is first.F and (first.E is second.E) == (share == "layers")


def test_all_else_stays_the_same_object():
    model = vit("linformer")
    blocks, weight = list(model.blocks), model.blocks[0].attn.qkv.weight
    attention, calls = model.blocks[0].attn, []
    attention.register_forward_hook(lambda *_: calls.append(1))
    model.requires_grad_(False).to(torch.bfloat16)
    resize(model, 32)
    assert list(model.blocks) == blocks and model.blocks[0].attn is attention and attention.qkv.weight is weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    assert calls and not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", available_attention())
def test_the_same_size_changes_nothing(name):
    model, images = vit(name), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(resize(model, 16)(images), expected)


def test_a_resized_model_learns():
    model = resize(vit("linformer"), 24).train()
    model(torch.randn(2, 3, 24, 24)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "line"),
    [
        ("fused", 18, "patch_size=4: must divide image_size=18"),
        ("linformer", 8, "attention.linformer.k=6: must be at most 5, the number of tokens"),
        ("hybrid", 4, "attention.hybrid.window_size=2: must be at most 1, .*"),
        ("fused", "big", "image_size.*"),
        ("fused", 0, "image_size.*"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_and_nothing_changed(name, size, line):
    model = vit(name)
    before, config = copy.deepcopy(model.state_dict()), model.config
    with pytest.raises(UserError, match=line):
        resize(model, size)
    assert model.config is config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_of_another_library_is_told_what_to_do():
    with pytest.raises(
        UserError, match=r"^resize: got a Linear, expected effvit's ViT; .* then call swap_attention again$"
    ):
        resize(torch.nn.Linear(2, 2), 16)
