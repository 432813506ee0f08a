import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effvit import ViT, ViTConfig, available_attention
from effvit.errors import UserError

# The flat dictionary of the study that this one follows, as it stands there.
FLAT = {
    "patch_size": 4,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "image_size": 32,
    "num_classes": 10,
    "num_channels": 3,
    "qkv_bias": True,
    "use_faster_attention": False,
    "attention_type": "linformer",
    "linformer_k": 32,
    "performer_features": 24,
    "nystrom_landmarks": 12,
}


OPTIONS = {"nystromformer": {"num_landmarks": 5}, "linformer": {"k": 6}, "hybrid": {"window_size": 2}}
OPTIONS |= {"agent": {"agent_size": 2}, "pooled": {"pool_size": 3}, "window": {"window_size": 2}}


def small_config(name="fused", **changes):
    fields = {
        "image_size": 16,
        "num_hidden_layers": 2,
        "num_classes": 7,
        "attention": name,
        "attention_options": OPTIONS.get(name, {}),
        "initializer_range": 0.2,
    }
    return ViTConfig(**(fields | changes))


def small_model(name="fused", **changes):
    torch.manual_seed(0)
    return ViT(small_config(name, **changes)).eval()


@pytest.mark.parametrize("bias", [True, False])
def test_with_fused_attention_it_is_timms_vision_transformer_name_for_name(bias):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="a peer: pip install effvit[peers]")
    model = small_model(qkv_bias=bias, num_attention_heads=3, intermediate_size=96)
    theirs = timm.VisionTransformer(
        img_size=16, patch_size=4, num_classes=7, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, qkv_bias=bias
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too must matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-4)
    model.load_state_dict(theirs.state_dict(), strict=True)


def test_patches_are_row_major():
    model = small_model()
    image = torch.zeros(1, 3, 16, 16)
    image[..., 4:8, 8:12] = 1  # row 1, column 2 of a 4 x 4 grid
    with torch.no_grad():
        changed = (model.patch_embed(image) - model.patch_embed(torch.zeros_like(image))).abs().sum(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("name", available_attention())
def test_any_mechanism_classifies_and_shows_a_map_a_block(name):
    model = small_model(name)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        logits, maps = model(images, output_attentions=True)
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
    assert logits.shape == (3, 7)
    assert [tuple(matrix.shape) for matrix in maps] == [(3, 4, 17, 17)] * 2


def test_the_map_of_the_first_block_is_of_its_normed_tokens():
    model = small_model()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        _, maps = model(images, output_attentions=True)
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
        block = model.blocks[0]
        torch.testing.assert_close(maps[0], block.attn(block.norm1(tokens), return_map=True)[1])


@pytest.mark.parametrize("name", available_attention())
def test_a_logit_does_not_depend_on_the_batch(name):
    model = small_model(name)
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        batch = model(torch.cat([image, 40 * torch.randn(3, 3, 16, 16)]))
        torch.testing.assert_close(batch[:1], model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", available_attention())
def test_weights_start_truncated_normal_and_the_rest_as_it_should(name):
    torch.manual_seed(0)
    model = ViT(small_config(name, hidden_size=96, intermediate_size=384, initializer_range=0.03))
    seen = [model.pos_embed]
    for key, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Linear) or key == "patch_embed.proj":
            if key.endswith("gate"):
                assert (module.weight == 0).all()
            else:
                seen.append(module.weight)
            assert module.bias is None or (module.bias == 0).all()
    for weight in seen:
        assert weight.std().item() == pytest.approx(0.03, rel=0.15)
        assert weight.mean().item() == pytest.approx(0, abs=0.004)
    assert model.cls_token.std().item() == pytest.approx(0.03, rel=0.3)


@pytest.mark.parametrize("value_conv", [3, 5])
def test_a_convolution_of_values_starts_as_a_twentieth_of_their_size(value_conv):
    model = small_model(hidden_size=192, value_conv=value_conv, initializer_range=0.3)
    tokens = torch.randn(2, 17, 192)
    for attention in model.attentions():
        with torch.no_grad():
            added = attention.add_value_conv(torch.zeros(2, 4, 17, 48), tokens, torch.randn(2, 4, 17, 48))
        assert not added[:, :, 0].any()
        inside = added[:, :, 1:].unflatten(2, (4, 4))[:, :, 1:3, 1:3]  # 3 x 3 patches lie in the grid
        if value_conv == 3:
            assert inside.std().item() == pytest.approx(0.05, rel=0.1)
        assert attention.value_conv.weight.std().item() == pytest.approx(0.05 / value_conv, rel=0.1)


def test_initialisation_leaves_the_mechanisms_own_scale_alone():
    torch.manual_seed(0)
    performer = ViT(small_config("performer", initializer_range=0.001)).attentions()[0]
    linformer = ViT(small_config("linformer", initializer_range=0.001)).attentions()[0]
    assert performer.omega.std().item() == pytest.approx(1, abs=0.15)
    assert linformer.E.std().item() == pytest.approx(17**-0.5, rel=0.2)


@pytest.mark.parametrize("name", available_attention())
def test_a_seed_fixes_the_whole_model(name):
    states = []
    for _ in range(2):
        torch.manual_seed(4)
        states.append(ViT(small_config(name)).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("value_conv", [0, 3])
@pytest.mark.parametrize("name", available_attention())
def test_its_macs_are_what_torch_counts_and_what_hooks_on_its_layers_see(name, value_conv):
    model = small_model(name, value_conv=value_conv)
    image = torch.zeros(1, 3, 16, 16)
    by_layers = 0

    def count(layer, inputs, output):
        nonlocal by_layers
        by_layers += output.numel() * layer.weight[0].numel()

    for key, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".attn" not in key:
            module.register_forward_hook(count)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    assert model.macs() * 2 == counter.get_total_flops()  # a FLOP count is two a MAC
    assert by_layers == model.macs() - model.attention_macs()
    assert model.attention_macs() == sum(attention.macs() for attention in model.attentions())


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_only(field):
    model = small_model(**{field: 0.5})
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("shape", [(2, 3, 16, 17), (2, 1, 16, 16), (3, 16, 16), (2, 3, 32, 32)])
def test_images_of_a_wrong_shape_are_refused_by_both_shapes(shape):
    with pytest.raises(UserError, match=r"expected \(batch, 3, 16, 16\)") as error:
        small_model()(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "attention_type, options",
    [
        ("standard", {}),
        ("linformer", {"k": 32}),
        ("performer", {"num_features": 24}),
        ("nystromformer", {"num_landmarks": 12}),
        ("hybrid", {}),
    ],
)
def test_the_flat_dictionary_is_read(attention_type, options):
    config = ViTConfig.from_dict(FLAT | {"attention_type": attention_type})
    assert config == ViTConfig(attention=attention_type, attention_options=options)
    assert ViT(config)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("faster, expected", [(True, "fused"), (False, "standard")])
def test_faster_attention_is_fused_attention(faster, expected):
    flat = {key: value for key, value in FLAT.items() if key != "attention_type"} | {"use_faster_attention": faster}
    assert ViTConfig.from_dict(flat).attention == expected
    assert ViTConfig.from_dict(FLAT | {"use_faster_attention": faster}).attention == "linformer"


def test_its_own_fields_are_read_too_and_back():
    config = small_config("linformer")
    assert ViTConfig.from_dict(config.model_dump()) == config


@pytest.mark.parametrize(
    "values, says",
    [
        (FLAT | {"nystrom_landmark": 3}, "nystrom_landmark: unknown"),
        (FLAT | {"attention_type": "flash"}, "attention='flash'"),
        (FLAT | {"linformer_k": 66}, r"attention\.linformer\.k=66.*65"),
        (FLAT | {"linformer_k": 0}, r"attention\.linformer\.k=0"),
        (FLAT | {"attention": "fused"}, "attention: not together"),
        ({"patch_size": 5}, "patch_size=5.*32"),
        ({"num_attention_heads": 5}, "num_attention_heads=5.*48"),
        ({"hidden_size": "48"}, "hidden_size='48'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0"),
        ({"attention": "hybrid", "attention_options": {"window_size": 9}}, r"attention\.hybrid\.window_size=9.*8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(values, says):
    with pytest.raises(UserError, match=says) as error:
        ViTConfig.from_dict(values)
    assert "\n" not in str(error.value)


def test_the_constructor_itself_raises_a_value_error():
    with pytest.raises(ValidationError, match="patch_size=5"):
        ViTConfig(patch_size=5)
