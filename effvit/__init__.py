"""effvit: interchangeable attention mechanisms in one Vision Transformer, trained and measured alike.

The names below are the whole public API. They load on first use, so that ``import effvit`` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effvit.attention import available_attention, build_attention
    from effvit.measure.models import compare
    from effvit.model.checkpoint import load_model, save_model
    from effvit.model.vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig", "available_attention", "build_attention", "compare", "load_model", "save_model"]
__version__ = "0.1.0"

_HOME = {
    "ViT": "effvit.model.vit",
    "ViTConfig": "effvit.model.vit",
    "available_attention": "effvit.attention",
    "build_attention": "effvit.attention",
    "compare": "effvit.measure.models",
    "load_model": "effvit.model.checkpoint",
    "save_model": "effvit.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effvit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
