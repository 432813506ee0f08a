"""effvit: interchangeable attention mechanisms in one Vision Transformer, trained and measured alike.

The names below are the whole public API. They load on first use, so that ``import effvit`` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effvit.adapters.report import SwapReport
    from effvit.adapters.swap import swap_attention
    from effvit.adapters.timm import timm_layer
    from effvit.attention import available_attention, build_attention
    from effvit.model.checkpoint import load_model
    from effvit.model.resize import resize
    from effvit.model.vit import ViT, ViTConfig

__all__ = [
    "SwapReport",
    "ViT",
    "ViTConfig",
    "available_attention",
    "build_attention",
    "load_model",
    "resize",
    "swap_attention",
    "timm_layer",
]
__version__ = "0.1.0"

_HOME = {
    "SwapReport": "effvit.adapters.report",
    "ViT": "effvit.model.vit",
    "ViTConfig": "effvit.model.vit",
    "available_attention": "effvit.attention",
    "build_attention": "effvit.attention",
    "load_model": "effvit.model.checkpoint",
    "resize": "effvit.model.resize",
    "swap_attention": "effvit.adapters.swap",
    "timm_layer": "effvit.adapters.timm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effvit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
