"""What the directory of another library's model says in addition to its weights, to check the model that loads them."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from effvit.adapters.host import Tower, comes_from
from effvit.adapters.signature import mechanism_of
from effvit.attention import Attention
from effvit.errors import UserError
from effvit.model.trained_on import TrainedOn

_ACTIVATION = re.compile("GELU|ReLU|SiLU|Swish|Tanh|Mish|Sigmoid", re.IGNORECASE)
_SIZES = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")  # torchvision's
_HEADS = ("head", "heads", "classifier", "fc")
_LIBRARIES = {"timm": "timm's", "transformers": "transformers'", "torchvision": "torchvision's"}


class Swap(BaseModel):
    """A mechanism with all of its options, and the blocks that have it and share what it shares between blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: str
    options: dict[str, Any]
    layers: list[int]
    value_conv: int = 0


class SavedTower(BaseModel):
    """A Vision Transformer in a model: what its weights do not show, and the mechanisms in its blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    depth: int
    num_heads: int | None
    prefix_tokens: int
    grid_size: tuple[int, int] | None
    swaps: list[Swap]


class Settings(TrainedOn):
    """``config.json`` of another library's model.

    ``build`` says how to build one, ``config`` is its library's own; ``function`` is what logits depend on and weights
    do not show, as far as modules of any library say it.
    """

    cls: str
    build: str
    config: dict[str, Any]
    function: dict[str, list[Any]]
    towers: list[SavedTower]


def describe_tower(tower: Tower) -> SavedTower:
    """Describe a Vision Transformer as it is in a model."""
    modules = {site.block: tower.module.get_submodule(_inside(tower, site.name)) for site in tower.sites}
    heads = {_num_heads(module) for module in modules.values()}
    return SavedTower(
        name=tower.name,
        depth=tower.depth,
        num_heads=heads.pop() if len(heads) == 1 else None,
        prefix_tokens=tower.prefix_tokens,
        grid_size=tower.grid_size,
        swaps=_swaps(modules),
    )


def _inside(tower: Tower, name: str) -> str:
    return name.removeprefix(f"{tower.name}.") if tower.name else name


def _num_heads(module: nn.Module) -> int | None:
    names = ("num_heads", "num_attention_heads")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)


def _swaps(modules: dict[int, nn.Module]) -> list[Swap]:
    """Mechanisms by block, those together that share weights or have nothing to share."""
    mechanisms = {block: module for block, module in modules.items() if isinstance(module, Attention)}
    seen = [id(tensor) for module in mechanisms.values() for tensor in {*module.parameters(), *module.buffers()}]
    groups: dict[Any, Swap] = {}
    for block, module in mechanisms.items():
        shared = frozenset(id(t) for t in (*module.parameters(), *module.buffers()) if seen.count(id(t)) > 1)
        name = mechanism_of(module).__module__.rpartition(".")[-1]
        options = module.options.model_dump(mode="json")
        key = name, json.dumps(options, sort_keys=True), module.value_conv_size, shared
        swap = Swap(attention=name, options=options, layers=[], value_conv=module.value_conv_size)
        groups.setdefault(key, swap).layers.append(block)
    return list(groups.values())


def class_of(model: nn.Module) -> str:
    """Name of a model's class with its module."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def library_config(model: nn.Module) -> dict[str, Any]:
    """What a model's library tells of it."""
    if comes_from(model, "transformers", "PreTrainedModel"):
        config: Any = model.config
        return _plain(config.to_dict())
    if comes_from(model, "timm", "VisionTransformer"):
        return _plain(getattr(model, "pretrained_cfg", {})) | _plain({"num_classes": getattr(model, "num_classes", 0)})
    if comes_from(model, "torchvision", "VisionTransformer"):
        return _plain({name: getattr(model, name) for name in _SIZES if hasattr(model, name)})
    return {}


def function_of(model: nn.Module) -> dict[str, list[Any]]:
    """Activations, the norms' epsilon, and pooling, where it is a model's attribute as in timm."""
    modules = list(model.modules())
    found: dict[str, set[Any]] = {
        "activations": {_activation(module) for module in modules if _ACTIVATION.search(type(module).__name__)},
        "epsilon of norms": {module.eps for module in modules if isinstance(getattr(module, "eps", None), float)},
        "pooling": {module.global_pool for module in modules if isinstance(getattr(module, "global_pool", None), str)},
    }
    return {what: sorted(values) for what, values in found.items()}


def _activation(module: nn.Module) -> str:
    approximate = getattr(module, "approximate", "none")
    return type(module).__name__ + ("" if approximate == "none" else f" ({approximate})")


def how_to_build(model: nn.Module) -> str:
    """Code for a reader, never run by this package."""
    told, name = library_config(model), type(model).__name__
    if comes_from(model, "transformers", "PreTrainedModel"):
        return f'transformers.{name}(transformers.{type(model.config).__name__}.from_dict(the "config" in config.json))'
    if comes_from(model, "timm", "VisionTransformer") and told.get("architecture"):
        return (
            f'timm.create_model("{told["architecture"]}", num_classes={told["num_classes"]}), and what else was changed'
        )
    return f"{class_of(model)}, built as it was"


def num_classes(model: nn.Module) -> int | None:
    """Number of classes of another library's model, None where it cannot be told.

    The head as it is counts before what is written of it, which does not change when a head is replaced.
    """
    for name in _HEADS:
        if (outputs := _outputs(getattr(model, name, None))) is not None:
            return outputs
    if comes_from(model, "transformers", "PreTrainedModel"):  # all have num_labels, also those without a classifier
        config: Any = model.config
        return config.num_labels if "ForImageClassification" in type(model).__name__ else None
    return _outputs(model)


def _outputs(head: Any) -> int | None:
    if isinstance(head, nn.Sequential) and len(head):
        head = head[-1]
    return head.out_features if isinstance(head, nn.Linear) else None


def num_channels(towers: list[Tower]) -> int | None:
    """Channels of the images that the first Vision Transformer of a model takes, None where there is none."""
    convolutions = (module for tower in towers for module in tower.module.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return None if first is None else first.in_channels


def require_same_library(saved: str, model: nn.Module) -> None:
    """Raise ``UserError`` where a model is of one library and the class ``saved`` of another."""
    here = class_of(model)
    (of_saved, _, _), (of_model, _, _) = saved.partition("."), here.partition(".")
    if of_saved != of_model and {of_saved, of_model} <= _LIBRARIES.keys():
        told = (f"{_LIBRARIES[cls.partition('.')[0]]} {cls.rpartition('.')[-1]}" for cls in (saved, here))
        raise UserError("saved as {}, given {}".format(*told))


def _plain(value: Any) -> Any:
    """What JSON can say of a value; what it cannot say is left out of dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items() if _can_be_told(each)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value if _can_be_told(each)]
    return value


def _can_be_told(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | list | tuple | Mapping)
