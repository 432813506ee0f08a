"""Sizes of ViTs by name."""

from typing import Any

from effvit.errors import UserError

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


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that make a ViT of that size.

    Args:
        name: one of `available_presets`.
        **changes: fields that differ; None keeps the preset's.

    Raises:
        UserError: there is no preset of that name.
    """
    if name not in _SIZES:
        raise UserError(f"model={name!r}: unknown size, expected one of {', '.join(_SIZES)}")
    return dict(zip(_FIELDS, _SIZES[name], strict=True)) | {k: v for k, v in changes.items() if v is not None}
