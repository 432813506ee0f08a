"""effvit: interchangeable attention mechanisms in one Vision Transformer, trained and measured alike.

The names below are the whole public API. They load on first use, so that ``import effvit`` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effvit.adapters.report import SwapReport
    from effvit.adapters.saved import load_model, save_model
    from effvit.adapters.swap import swap_attention
    from effvit.adapters.timm import timm_layer
    from effvit.attention import available_attention, build_attention
    from effvit.measure.models import compare
    from effvit.model.resize import resize
    from effvit.model.vit import ViT, ViTConfig
    from effvit.notebook.data import open_data, prepare_data
    from effvit.notebook.pictures import visualize_attention, visualize_images
    from effvit.notebook.scores import evaluate, predict
    from effvit.notebook.trainer import Trainer

__all__ = [
    "SwapReport",
    "Trainer",
    "ViT",
    "ViTConfig",
    "available_attention",
    "build_attention",
    "compare",
    "evaluate",
    "load_model",
    "open_data",
    "predict",
    "prepare_data",
    "resize",
    "save_model",
    "swap_attention",
    "timm_layer",
    "visualize_attention",
    "visualize_images",
]
__version__ = "0.1.0"

_HOME = {
    "SwapReport": "effvit.adapters.report",
    "Trainer": "effvit.notebook.trainer",
    "ViT": "effvit.model.vit",
    "ViTConfig": "effvit.model.vit",
    "available_attention": "effvit.attention",
    "build_attention": "effvit.attention",
    "compare": "effvit.measure.models",
    "evaluate": "effvit.notebook.scores",
    "load_model": "effvit.adapters.saved",
    "open_data": "effvit.notebook.data",
    "predict": "effvit.notebook.scores",
    "prepare_data": "effvit.notebook.data",
    "resize": "effvit.model.resize",
    "save_model": "effvit.adapters.saved",
    "swap_attention": "effvit.adapters.swap",
    "timm_layer": "effvit.adapters.timm",
    "visualize_attention": "effvit.notebook.pictures",
    "visualize_images": "effvit.notebook.pictures",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'effvit' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from effvit.errors import extra_of

        if (extra := extra_of(error.name or "")) is None:
            raise
        raise ModuleNotFoundError(
            f"effvit.{name} needs the package {error.name}: pip install 'effvit[{extra}]'", name=error.name
        ) from error
