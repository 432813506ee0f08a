"""Models of any library on disk.

An effvit ViT is built again from its directory. Another library's model is not: its directory says which model it is
and what was put into it, and whoever loads it builds that model first. Nothing is unpickled, no code is run.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import ValidationError
from torch import nn

from effvit.adapters.description import (
    SavedTower,
    Settings,
    class_of,
    describe_tower,
    function_of,
    how_to_build,
    library_config,
    num_channels,
    num_classes,
    require_same_library,
)
from effvit.adapters.swap import find_towers, swap_attention
from effvit.attention import check_options
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
        directory: where ``model.safetensors``, ``config.json`` and ``README.md``, the model card, are written; absent,
            empty or an earlier model's.
        classes: names of classes, by index. Where none are given, those of ``model.trained_on`` are written.
        mean: of each channel of the images that it was trained on, on a scale of 0 to 1; likewise.
        std: standard deviation of the same; likewise.
        dataset: name of the data set, for the card.
        accuracy: top-1 as a fraction, by split (``{"validation": 0.98}``), for the card.
        recipe: settings of the training, for the card.
        license: of the weights, as the hub names licences.

    Raises:
        UserError: a `ViT` that is not what its configuration says, or what is said of a model does not fit it; the
            directory has something else in it than a model, or cannot be written.
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
    found = find_towers(inner)
    about.check(num_classes(inner), num_channels(found))
    towers = [describe_tower(tower) for tower in found]
    build = how_to_build(inner)
    settings = {
        "class": class_of(inner),
        "build": build,
        "config": library_config(inner),
        "function": function_of(inner),
        "towers": [tower.model_dump(mode="json") for tower in towers],
    }
    card = write_card_of_other(inner, _mechanisms(towers), build, about, notes)
    checkpoint.write_directory(directory, _tensors(inner), settings | about.known(), card)


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
            Its attention is swapped where the saved one's was, all weights are loaded, and it is what is returned.
            Names and shapes of weights, heads, tokens, activations, the norms' epsilon and pooling are compared.

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
    tensors = read_safetensors(directory / WEIGHTS)
    try:
        _load_into(into, settings, tensors)
    except UserError as error:
        raise UserError(f"{directory}: this {settings.cls} does not go into the model given: {error}") from error
    about = TrainedOn(classes=settings.classes, mean=settings.mean, std=settings.std)
    model: Any = into  # on which an attribute may be set
    model.trained_on = about
    return (into if device is None else into.to(device)).eval()


def _load_into(model: nn.Module, settings: Settings, tensors: StateDict) -> None:
    if checkpoint.unwrapped(model) is not model:
        raise UserError(f"it is inside {type(model).__name__}; load first, then wrap it")
    require_same_library(settings.cls, model)
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
    there = {tower.name: describe_tower(tower) for tower in find_towers(trial)}
    for tower in settings.towers:
        if tower.name not in there:
            raise UserError(f"it has no Vision Transformer {tower.name!r}" if tower.name else "no Vision Transformer")
        _compare(tower, there[tower.name])
    _swap(trial, settings.towers)
    if [describe_tower(tower) for tower in find_towers(trial)] != settings.towers:
        raise UserError("it has mechanisms where the saved one has not; build it anew")
    checkpoint.require_all(_tensors(trial), tensors)
    here = function_of(trial)
    for what, theirs in settings.function.items():
        if theirs != here.get(what):
            raise UserError(f"its {what}: {_listed(here.get(what, []))}, saved {_listed(theirs)}")


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
            check_options(swap.attention, swap.options)  # no argument of another kind among them
            module = model.get_submodule(tower.name)
            swap_attention(module, swap.attention, layers=swap.layers, value_conv=swap.value_conv, **swap.options)


def _parse(file: Path, values: dict[str, Any]) -> Settings:
    try:
        return Settings(**{"cls" if key == "class" else key: value for key, value in values.items()})
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error)}") from error


def _mechanisms(towers: list[SavedTower]) -> dict[str, str]:
    """By mechanism, which blocks have it."""
    found: dict[str, list[str]] = {}
    for tower in towers:
        for swap in tower.swaps:
            convolution = {"value_conv": swap.value_conv} if swap.value_conv else {}
            options = ", ".join(f"{key}={value}" for key, value in (swap.options | convolution).items())
            where = f"{len(swap.layers)} of {tower.depth} blocks" + (f" of {tower.name}" if tower.name else "")
            found.setdefault(swap.attention, []).append(where + (f" ({options})" if options else ""))
    return {name: "; ".join(places) for name, places in found.items()}


def _tensors(model: nn.Module) -> StateDict:
    """Stored weights, each once, under names without those of compiled parts."""
    return {name.replace(_COMPILED, ""): tensor for name, tensor in stored_once(model).items()}


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
