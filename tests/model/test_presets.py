from pathlib import Path

import pytest
import torch
import yaml

from effvit import ViT, ViTConfig
from effvit.errors import UserError
from effvit.model.presets import available_presets, of_timm, preset

CONF = Path(__file__).parents[2] / "conf/model"


@pytest.mark.parametrize("name", available_presets())
def test_presets_are_the_sizes_of_the_studys_configuration(name):
    sizes, in_conf = preset(name), yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    assert {key: value for key, value in sizes.items() if in_conf.get(key) != value}.keys() == {"patch_size"}
    assert ViTConfig(**sizes, image_size=224 if sizes["patch_size"] == 16 else 32).hidden_size == sizes["hidden_size"]


@pytest.mark.parametrize("name, theirs", [("deit_tiny", "deit_tiny_patch16_224"), ("vit_base", "vit_base_patch16_224")])
def test_presets_are_timms_sizes(name, theirs):
    pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    fields = of_timm(theirs)
    assert fields == preset(name) | {"prefix_tokens": 1, "qkv_bias": True, "layer_norm_eps": 1e-6}


def test_a_model_of_timms_size_has_timms_logits():
    timm = pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_384", img_size=32, depth=12, num_classes=5).eval()
    ours = ViT(ViTConfig(**of_timm("vit_tiny_patch16_384"), image_size=32, num_classes=5)).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, says",
    [
        ("vit_huge_patch16_31", "timm model vit_huge_patch16_31: timm .* cannot build it"),
        ("resnet18", "ResNet is no plain ViT"),
        ("deit3_small_patch16_224", "differs from this ViT in .*ls1"),
        ("vit_base_patch16_siglip_224", "differs from this ViT in .*attn_pool"),
        ("vit_medium_patch16_reg4_gap_256", "differs from this ViT in "),
    ],
)
def test_models_that_this_vit_cannot_be_are_refused_in_one_line_that_says_why(name, says):
    pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    with pytest.raises(UserError, match=says) as error:
        of_timm(name)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"model='vit_huge': unknown size, expected one of tiny, small, deit_tiny"):
        preset("vit_huge")
