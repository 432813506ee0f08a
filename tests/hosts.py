"""Small, randomly initialised Vision Transformers of other libraries, of 4 x 4 patches at 16 x 16 pixels."""

from functools import cache

import pytest
import torch

from effvit import ViT, ViTConfig

TIMM_REASON = "a peer: pip install effvit[peers]"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
# What fits 4 x 4 patches.
OPTIONS = {"linformer": {"k": 6}, "nystromformer": {"num_landmarks": 5}, "hybrid": {"window_size": 2}}
OPTIONS |= {"agent": {"agent_size": 2}, "pooled": {"pool_size": 3}, "window": {"window_size": 2}}


def timm_vit(distilled=False, **changes):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason=TIMM_REASON)
    cls = vision_transformer.VisionTransformer
    if distilled:
        from timm.models.deit import VisionTransformerDistilled as cls
    fields = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
    return cls(**(fields | changes))


def hugging_face(model, config, implementation="sdpa", **changes):
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    made = getattr(transformers, config)(**(SMALL | changes))
    return getattr(transformers, model)._from_config(made, attn_implementation=implementation)


def torchvision_vit(**changes):
    VisionTransformer = pytest.importorskip("torchvision.models.vision_transformer").VisionTransformer

    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    return VisionTransformer(**(sizes | {"num_classes": 5} | changes))


def own(**changes):
    fields = {**SMALL, "intermediate_size": 48, "num_classes": 5}
    return ViT(ViTConfig(**(fields | changes)))


# By name: how it is built, its prefix tokens, and its attention modules' names in several versions, * for the block.
FAMILIES = {
    "timm vit": (timm_vit, 1, ["blocks.*.attn"]),
    "timm deit distilled": (lambda: timm_vit(distilled=True), 2, ["blocks.*.attn"]),
    "timm deit3": (lambda: timm_vit(no_embed_class=True, init_values=1e-1), 1, ["blocks.*.attn"]),
    "timm dinov2 reg4": (
        lambda: timm_vit(reg_tokens=4, init_values=1e-1, no_embed_class=True, dynamic_img_size=True),
        5,
        ["blocks.*.attn"],
    ),
    "timm siglip": (lambda: timm_vit(class_token=False, global_pool="map"), 0, ["blocks.*.attn"]),
    "timm gap": (lambda: timm_vit(class_token=False, global_pool="avg", qkv_bias=False), 0, ["blocks.*.attn"]),
    "timm qk_norm": (lambda: timm_vit(qk_norm=True, proj_bias=False), 1, ["blocks.*.attn"]),
    "vit": (
        lambda: hugging_face("ViTForImageClassification", "ViTConfig"),
        1,
        ["vit.encoder.layer.*.attention.attention", "vit.layers.*.attention"],
    ),
    "deit": (
        lambda: hugging_face("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        2,
        ["deit.encoder.layer.*.attention.attention", "deit.layers.*.attention"],
    ),
    "dinov2": (
        lambda: hugging_face("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2),
        1,
        ["dinov2.encoder.layer.*.attention.attention", "dinov2.encoder.layer.*.attention"],
    ),
    "dinov2 registers": (
        lambda: hugging_face("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
        5,
        ["encoder.layer.*.attention.attention", "encoder.layer.*.attention"],
    ),
    "clip": (
        lambda: hugging_face("CLIPVisionModel", "CLIPVisionConfig"),
        1,
        ["vision_model.encoder.layers.*.self_attn", "encoder.layers.*.self_attn"],
    ),
    "siglip": (
        lambda: hugging_face("SiglipVisionModel", "SiglipVisionConfig"),
        0,
        ["vision_model.encoder.layers.*.self_attn", "encoder.layers.*.self_attn"],
    ),
    "torchvision": (torchvision_vit, 1, ["encoder.layers.encoder_layer_*.self_attention"]),
    "effvit": (own, 1, ["blocks.*.attn"]),
}
TIMM = [name for name in FAMILIES if name.startswith("timm")]
HUGGING_FACE = ["vit", "deit", "dinov2", "dinov2 registers", "clip", "siglip"]


@cache
def _state(family):
    torch.manual_seed(0)
    state = FAMILIES[family][0]().state_dict()
    return {name: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for name, t in state.items()}


def host(family):
    """A model of the family whose every weight matters, in eval mode; the same at each call."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    model.load_state_dict(_state(family))
    return model.eval()


@cache
def pattern(family):
    """Name of the attention modules, with * for the block."""
    names = {name for name, _ in host(family).named_modules()}
    return next(each for each in FAMILIES[family][2] if each.replace("*", "0") in names)


def attention_name(family, block):
    """Name of a block's attention module."""
    return pattern(family).replace("*", str(block))


def images(seed=1):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def outputs(model, x, **kwargs):
    """What a classifier or a backbone gives."""
    found = model(x, **kwargs)
    return found if isinstance(found, torch.Tensor) else found.logits if "logits" in found else found.last_hidden_state
