"""Models of any library on disk.

An effvit ViT is built again from its directory. Another library's model is not: its directory says which model it is
and what was put into it, and whoever loads it builds that model first. Nothing is unpickled, no code is run.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from effvit.adapters.host import Tower, comes_from
from effvit.adapters.signature import mechanism_of
from effvit.adapters.swap import find_towers, swap_attention
from effvit.attention import Attention
from effvit.errors import UserError, explain
from effvit.model import checkpoint
from effvit.model.card import write_card_of_other
from effvit.model.names import StateDict
from effvit.model.pretrained import stored_once
from effvit.model.settings import CONFIG, WEIGHTS, is_of_other
from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViT
from effvit.model.weights import read_safetensors

_COMPILED = "_orig_mod."
_SIZES = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")  # torchvision's


class Swap(BaseModel):
    """A mechanism with all of its options, and the blocks that have it and share what it shares between blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: str
    options: dict[str, Any]
    layers: list[int]


class SavedTower(BaseModel):
    """A Vision Transformer in a model: what its weights do not tell, and the mechanisms in its blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    depth: int
    num_heads: int | None
    prefix_tokens: int
    grid_size: tuple[int, int] | None
    swaps: list[Swap]


class Settings(TrainedOn):
    """``config.json`` of another library's model; ``build`` says how to build one, ``config`` is its library's own."""

    cls: str
    build: str
    config: dict[str, Any]
    towers: list[SavedTower]


def save_model(
    model: nn.Module,
    directory: Path | str,
    *,
    classes: Iterable[str] | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    dataset: str | None = None,
    accuracy: Mapping[str, float] | None = None,
    recipe: Mapping[str, Any] | None = None,
    license: str = "mit",
) -> None:
    """Write a model as the directory that `load_model` reads and the Hugging Face hub expects.

    Args:
        model: a `ViT`, or any other model, its attention swapped or not; it may be wrapped by ``torch.compile`` or
            DistributedDataParallel.
        directory: where ``model.safetensors``, ``config.json`` and ``README.md``, the model card, are written; made if
            it is not there.
        classes: names of classes, by index. Where none are given, those of ``model.trained_on`` are written.
        mean: of each channel of the images that it was trained on, on a scale of 0 to 1; likewise.
        std: standard deviation of the same; likewise.
        dataset: name of the data set, for the card.
        accuracy: top-1 as a fraction, by split (``{"validation": 0.98}``), for the card.
        recipe: settings of the training, for the card.
        license: of the weights, as the hub names licences.

    Raises:
        UserError: a `ViT` that is not what its configuration says, or what is said of a model does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"save_model: got {type(model).__name__}, expected a torch.nn.Module")
    inner = checkpoint.unwrapped(model)
    if isinstance(inner, ViT):
        checkpoint.save_model(
            inner,
            directory,
            classes=classes,
            mean=mean,
            std=std,
            dataset=dataset,
            accuracy=accuracy,
            recipe=recipe,
            license=license,
        )
        return
    about = checkpoint.known_of(inner, classes, mean, std)
    notes = checkpoint.notes_of(dataset, accuracy, recipe, license)
    towers = [_saved(tower) for tower in find_towers(inner)]
    build = _how_to_build(inner)
    settings = {
        "class": _class_of(inner),
        "build": build,
        "config": _told(inner),
        "towers": [tower.model_dump(mode="json") for tower in towers],
    }
    card = write_card_of_other(inner, _mechanisms(towers), build, about, notes)
    checkpoint.write_directory(Path(directory), _tensors(inner), settings | about.known(), card)


@overload
def load_model(
    path: Path | str,
    device: str | torch.device | None = None,
    *,
    num_attention_heads: int | None = None,
    into: None = None,
) -> ViT: ...


@overload
def load_model(
    path: Path | str,
    device: str | torch.device | None = None,
    *,
    num_attention_heads: int | None = None,
    into: nn.Module,
) -> nn.Module: ...


def load_model(
    path: Path | str,
    device: str | torch.device | None = None,
    *,
    num_attention_heads: int | None = None,
    into: nn.Module | None = None,
) -> nn.Module:
    """Give back a trained model, in eval mode; its ``trained_on`` has class names and normalisation where known.

    What a wrapper put before the names of the weights is taken off, and a line on stderr says so.

    Args:
        path: directory that `effvit train` or `save_model` wrote; or a directory or file with the weights of a plain
            ViT or DeiT of timm, transformers or torchvision, which becomes a model with ``fused`` attention.
        device: where to put it; by default the CPU, with ``into`` where that model is.
        num_attention_heads: for weights of other libraries without a ``config.json`` that tells it.
        into: for a directory that `save_model` wrote of another library's model: such a model, built as that one was.
            Its attention is swapped where the saved one's was, all weights are loaded, and it is what is returned. Not
            compared is what neither weights nor the arrangement of heads and tokens tell, such as the activation.

    Raises:
        UserError: a file is missing or damaged, the weights are not those of the configuration, or they are of a model
            that this ViT cannot be, or that ``into`` is not; ``into`` is then as it was.
    """
    if into is None:
        return checkpoint.load_model(path, device or "cpu", num_attention_heads=num_attention_heads)
    if not isinstance(into, nn.Module):
        raise UserError(f"into: got {type(into).__name__}, expected a torch.nn.Module")
    directory = checkpoint.directory_of(path)
    values = checkpoint.read_settings(directory)
    if not is_of_other(values):
        raise UserError(f"{directory}: not of another library's model that save_model wrote; load it without into=")
    settings = _parse(directory / CONFIG, values)
    try:
        _load_into(into, settings, read_safetensors(directory / WEIGHTS))
    except UserError as error:
        raise UserError(f"{directory}: this {settings.cls} does not go into the model given: {error}") from error
    about = TrainedOn(classes=settings.classes, mean=settings.mean, std=settings.std)
    into.trained_on = about  # type: ignore[assignment]
    return (into if device is None else into.to(device)).eval()


def _load_into(model: nn.Module, settings: Settings, tensors: StateDict) -> None:
    if checkpoint.unwrapped(model) is not model:
        raise UserError(f"it is inside {type(model).__name__}; load first, then wrap it")
    if any(tensor.is_meta for tensor in _tensors(model).values()):
        raise UserError("its weights are on the meta device; call to_empty first")
    _check(model, settings, tensors)
    _swap(model, settings.towers)
    with torch.no_grad():
        for name, target in _tensors(model).items():
            target.copy_(tensors[name])


def _check(model: nn.Module, settings: Settings, tensors: StateDict) -> None:
    """Try it on a copy that has no numbers; raise ``UserError`` where that does not become the saved model."""
    trial = copy.deepcopy(model, {id(t): _on_meta(t) for t in (*model.parameters(), *model.buffers())})
    there = {tower.name: _saved(tower) for tower in find_towers(trial)}
    for tower in settings.towers:
        if tower.name not in there:
            raise UserError(f"it has no Vision Transformer {tower.name!r}" if tower.name else "no Vision Transformer")
        _compare(tower, there[tower.name])
    _swap(trial, settings.towers)
    if [_saved(tower) for tower in find_towers(trial)] != settings.towers:
        raise UserError("it has mechanisms where the saved one has not; build it anew")
    checkpoint.require_all(_tensors(trial), tensors)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    moved = tensor.detach().to("meta")
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _compare(saved: SavedTower, here: SavedTower) -> None:
    for field in ("depth", "num_heads", "prefix_tokens", "grid_size"):
        theirs, ours = getattr(saved, field), getattr(here, field)
        if theirs != ours:
            raise UserError(f"{saved.name or 'its ViT'}: {field}={ours}, saved {theirs}")


def _swap(model: nn.Module, towers: list[SavedTower]) -> None:
    for tower in towers:
        for swap in tower.swaps:
            swap_attention(model.get_submodule(tower.name), swap.attention, layers=swap.layers, **swap.options)


def _parse(file: Path, values: dict[str, Any]) -> Settings:
    try:
        return Settings(**{"cls" if key == "class" else key: value for key, value in values.items()})
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error)}") from error


def _saved(tower: Tower) -> SavedTower:
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
        key = name, json.dumps(options, sort_keys=True), shared
        groups.setdefault(key, Swap(attention=name, options=options, layers=[])).layers.append(block)
    return list(groups.values())


def _mechanisms(towers: list[SavedTower]) -> dict[str, str]:
    """By mechanism, which blocks have it."""
    found: dict[str, list[str]] = {}
    for tower in towers:
        for swap in tower.swaps:
            options = ", ".join(f"{key}={value}" for key, value in swap.options.items())
            where = f"{len(swap.layers)} of {tower.depth} blocks" + (f" of {tower.name}" if tower.name else "")
            found.setdefault(swap.attention, []).append(where + (f" ({options})" if options else ""))
    return {name: "; ".join(places) for name, places in found.items()}


def _tensors(model: nn.Module) -> StateDict:
    """Weights as they are stored, each once, under names without those of compiled parts."""
    return {name.replace(_COMPILED, ""): tensor for name, tensor in stored_once(model).items()}


def _class_of(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _told(model: nn.Module) -> dict[str, Any]:
    """What a model's library tells of it."""
    if comes_from(model, "transformers", "PreTrainedModel"):
        return _plain(model.config.to_dict())  # type: ignore[operator, union-attr]
    if comes_from(model, "timm", "VisionTransformer"):
        return _plain(getattr(model, "pretrained_cfg", {})) | _plain({"num_classes": getattr(model, "num_classes", 0)})
    if comes_from(model, "torchvision", "VisionTransformer"):
        return _plain({name: getattr(model, name) for name in _SIZES if hasattr(model, name)})
    return {}


def _how_to_build(model: nn.Module) -> str:
    """Code for a reader, never run by this package."""
    told, name = _told(model), type(model).__name__
    if comes_from(model, "transformers", "PreTrainedModel"):
        return f'transformers.{name}(transformers.{type(model.config).__name__}.from_dict(the "config" in config.json))'
    if comes_from(model, "timm", "VisionTransformer") and told.get("architecture"):
        return (
            f'timm.create_model("{told["architecture"]}", num_classes={told["num_classes"]}), and what else was changed'
        )
    return f"{_class_of(model)}, built as it was"


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
