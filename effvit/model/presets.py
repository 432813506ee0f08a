"""Sizes of ViTs by name."""

import functools
from typing import Any

import torch
from torch import nn

from effvit.errors import UserError, did_you_mean
from effvit.model.vit import ViT, ViTConfig

# tiny and small are for images of 32 pixels; the others are DeiT's and ViT's (arXiv 2012.12877, 2010.11929).
_SIZES: dict[str, tuple[int, int, int, int, int, float]] = {
    # patch_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, initializer_range
    "tiny": (4, 48, 4, 4, 192, 0.1),
    "small": (4, 80, 6, 5, 320, 0.1),
    "deit_tiny": (16, 192, 12, 3, 768, 0.02),
    "deit_small": (16, 384, 12, 6, 1536, 0.02),
    "vit_base": (16, 768, 12, 12, 3072, 0.02),
}
_FIELDS = (
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "initializer_range",
)


def available_presets() -> tuple[str, ...]:
    """Names of all sizes."""
    return tuple(_SIZES)


def preset(name: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that make a ViT of that size.

    Args:
        name: one of `available_presets`, or the fields of another size, such as `of_timm` gives.
        **changes: fields that differ; None keeps the preset's.

    Raises:
        UserError: there is no preset of that name.
    """
    if isinstance(name, str):
        if name not in _SIZES:
            hint = did_you_mean(name, _SIZES)
            raise UserError(f"model={name!r}: unknown size, expected one of {', '.join(_SIZES)}{hint}")
        name = dict(zip(_FIELDS, _SIZES[name], strict=True))
    return name | {key: value for key, value in changes.items() if value is not None}


@functools.cache
def of_timm(name: str) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that make a ViT of timm size ``name``, weights not included.

    Raises:
        UserError: timm is not installed or has no such model; or it has parts that this ViT has none of.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"timm model {name}: needs the package timm: pip install 'effvit[peers]'") from error
    try:
        with torch.device("meta"):  # sizes alone
            theirs: Any = timm.create_model(name, pretrained=False)
    except Exception as error:  # of whatever kind: there are many in so many models
        raise UserError(f"timm model {name}: timm {timm.__version__} cannot build it: {error}") from error
    if not hasattr(theirs, "blocks") or not hasattr(theirs, "patch_embed") or not hasattr(theirs, "num_prefix_tokens"):
        raise UserError(f"timm model {name}: {type(theirs).__name__} is no plain ViT, such as vit_small_patch16_224")
    block = theirs.blocks[0]
    if not (hasattr(block, "attn") and hasattr(block.attn, "qkv") and isinstance(theirs.patch_embed.patch_size, tuple)):
        raise UserError(f"timm model {name}: its blocks are {type(block).__name__}; expected a plain ViT")
    patch_size, _ = theirs.patch_embed.patch_size
    fields = {
        "patch_size": patch_size,
        "hidden_size": theirs.embed_dim,
        "num_hidden_layers": len(theirs.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "prefix_tokens": theirs.num_prefix_tokens,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": block.norm1.eps,
        "initializer_range": 0.02,
    }
    with torch.device("meta"):
        classes = theirs.head.out_features if isinstance(theirs.head, nn.Linear) else 1
        ours = ViT(ViTConfig(**fields, image_size=theirs.patch_embed.img_size, num_classes=classes))
    differs = {key: tensor.shape for key, tensor in theirs.state_dict().items()}.items() ^ {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }.items()
    pooled = theirs.global_pool == ("token" if fields["prefix_tokens"] else "avg")
    if differs or not pooled or not isinstance(block.mlp.act, nn.GELU):
        parts = sorted({key.split(".", 2)[-1] if key.startswith("blocks.") else key for key, _ in differs})
        what = ", ".join(parts[:6]) or f"pooling {theirs.global_pool!r}, {type(block.mlp.act).__name__}"
        raise UserError(f"timm model {name}: differs from this ViT in {what}; expected a plain ViT")
    return fields
