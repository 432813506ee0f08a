"""A trained model on disk: ``model.safetensors``, ``config.json`` and a model card in one directory."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as to_safetensors
from torch import nn

from effvit.errors import UserError, explain
from effvit.files import staged_file, write_json
from effvit.model.card import Notes, is_card, write_card
from effvit.model.names import StateDict, read_names, together
from effvit.model.pretrained import COMPARED, Source, maps_as_in, read_source, start_with, stored_once
from effvit.model.settings import CARD, CONFIG, WEIGHTS, is_of_other, is_ours, parse, read_json, settings_of
from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViT, ViTConfig
from effvit.model.weights import SUFFIXES, read_safetensors

_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "_FabricModule", "AveragedModel")
_USUAL_EPSILON = {"timm": 1e-6, "transformers": 1e-12, "torchvision": 1e-6}  # of norms, where nothing tells it


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
        model: a `ViT`, which may be wrapped by ``torch.compile`` or DistributedDataParallel.
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
        UserError: it is no `ViT`, is not what its configuration says, or what is said of it does not fit it; the
            directory has something else in it than a model, or cannot be written.
    """
    vit = unwrapped(model)
    if not isinstance(vit, ViT):
        raise UserError(f"save_model: got {type(model).__name__}, expected an effvit ViT")
    trained_on = known_of(vit, classes, mean, std)
    trained_on.check(vit.config.num_classes, vit.config.num_channels)
    notes = notes_of(dataset, accuracy, recipe, license)
    _require_as_configured(vit)
    card = write_card(vit, trained_on, notes)
    write_directory(directory, stored_once(vit), settings_of(vit.config, trained_on), card)


def known_of(
    model: nn.Module,
    classes: Iterable[str] | None,
    mean: Iterable[float] | None,
    std: Iterable[float] | None,
) -> TrainedOn:
    """What a caller says that a model was trained on, and else what the model knows itself; raises ``UserError``."""
    own = getattr(model, "trained_on", None)
    own = own if isinstance(own, TrainedOn) else TrainedOn()
    if mean is None and std is None:
        mean, std = own.mean, own.std
    about = TrainedOn.of(own.classes if classes is None else classes, mean, std)
    if classes is not None:  # a model of others may have a name twice, as ImageNet has: that one is kept as it is
        for name, count in Counter(about.classes or ()).items():
            if count > 1:
                raise UserError(f"classes: {name!r} is there {count} times; expected another name for each class")
    return about


def notes_of(
    dataset: str | None, accuracy: Mapping[str, float] | None, recipe: Mapping[str, Any] | None, license: str
) -> Notes:
    """Check what a caller says for the card; raises ``UserError``."""
    for name, value in {"accuracy": accuracy, "recipe": recipe}.items():
        if value is not None and not isinstance(value, Mapping):
            example = "{'validation': 0.98}" if name == "accuracy" else "{'lr': 0.001}"
            raise UserError(f"{name}={value!r}: expected a dictionary, for example {example}")
    try:
        return Notes(dataset=dataset, accuracy=dict(accuracy or {}), recipe=dict(recipe or {}), license=license)
    except ValidationError as error:
        raise UserError(explain(error)) from error


def write_directory(directory: Path | str, tensors: StateDict, settings: dict[str, Any], card: str) -> None:
    """Write weights, ``config.json`` and model card.

    Raises:
        UserError: the directory has something else in it than a model, or cannot be written.
    """
    directory = _made(path_of(directory, "directory"))
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with staged_file(directory / WEIGHTS) as aside:
        # Written here, as safetensors' own writer tells of a full disk in an error that is no OSError.
        aside.write_bytes(to_safetensors(contiguous, {"format": "pt"}))
    write_json(directory / CONFIG, settings)
    with staged_file(directory / CARD) as aside:
        aside.write_bytes(card.encode("utf-8", "backslashreplace"))


def path_of(path: Any, name: str) -> Path:
    """The path that the argument ``name`` is; raises ``UserError`` where it is none."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{name}: got {type(path).__name__}, expected a path")
    return Path(path)


def _made(directory: Path) -> Path:
    """Make a directory for a model; raises ``UserError`` where that is something else's, or cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        empty = not any(directory.iterdir())
    except OSError as error:
        at_file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "is or lies in a file" if at_file else str(error.strerror)
        raise UserError(f"{directory}: {why}; expected a new or an empty directory") from error
    if not (empty or is_model_dir(directory) or _is_dir_of_other(directory)):
        raise UserError(f"{directory}: holds something else; expected a new or an empty directory")
    if not os.access(directory, os.W_OK):
        raise UserError(f"{directory}: cannot be written to")
    return directory


def _is_dir_of_other(directory: Path) -> bool:
    """Whether the directory is what `save_model` wrote of another library's model, and no more."""
    try:
        whole = {path.name for path in directory.iterdir()} == {WEIGHTS, CONFIG, CARD}
        return (
            whole
            and is_of_other(read_json(directory / CONFIG))
            and is_card((directory / CARD).read_text(encoding="utf-8"))
        )
    except (OSError, ValueError):
        return False


def is_model_dir(directory: Path) -> bool:
    """Whether the directory is what a training wrote, and no more: whether it can be replaced at no one's loss.

    Others have a ``config.json`` too, some next to a ``model.safetensors``: theirs does not read as a `ViTConfig`.
    """
    try:
        others = {path.name for path in directory.iterdir()} - {WEIGHTS, CONFIG}
        values = read_json(directory / CONFIG)
        parse(directory / CONFIG, values)
        if CARD in others and not is_card((directory / CARD).read_text(encoding="utf-8")):
            return False
    except (OSError, ValueError):
        return False
    whole = is_ours(values) and (directory / WEIGHTS).is_file()  # {} reads as well: all has a default
    epochs = others - {CARD}
    return whole and all(re.fullmatch(r"epoch-\d+", name) and is_model_dir(directory / name) for name in epochs)


def load_model(path: Path | str, device: str | torch.device = "cpu", *, num_attention_heads: int | None = None) -> ViT:
    """Give back a trained model, in eval mode; its ``trained_on`` has class names and normalisation where known.

    What a wrapper put before the names of the weights is taken off, and a line on stderr says so.

    Args:
        path: directory that `effvit train` or `save_model` wrote; or a directory or file with the weights of a plain
            ViT or DeiT of timm, transformers or torchvision, which becomes a model with ``fused`` attention.
        device: where to put it.
        num_attention_heads: for weights of other libraries without a ``config.json`` that tells it.

    Raises:
        UserError: a file is missing or damaged, the weights are not those of the configuration, or they are of a model
            that this ViT cannot be.
    """
    path = directory_of(path)
    if path.suffix in SUFFIXES and not path.is_dir():
        return _load_other(read_source(path), num_attention_heads).to(device).eval()
    values = read_settings(path)
    if is_of_other(values):
        raise UserError(
            f"{path}: has the weights of {values['class']}; build that model in Python ({values.get('build')}), then "
            "effvit.load_model(..., into=model)"
        )
    model = _load_own(path, values) if is_ours(values) else _load_other(read_source(path), num_attention_heads)
    return model.to(device).eval()


def directory_of(path: Path | str) -> Path:
    """The path, or the model directory where it is of the weights in one."""
    path = path_of(path, "path")
    return path.parent if path.name == WEIGHTS and path.with_name(CONFIG).is_file() else path


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a model directory; raises ``UserError`` where a file is missing or damaged."""
    for name in (WEIGHTS, CONFIG):
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name}: no such file; a model directory is what `effvit train` or save_model writes"
            )
    return read_json(directory / CONFIG)


def _load_own(directory: Path, values: dict[str, Any]) -> ViT:
    config, trained_on = parse(directory / CONFIG, values)
    model = ViT(config)
    tensors = read_safetensors(directory / WEIGHTS)
    try:
        named = read_names(tensors)
        _tell_taken_off(directory / WEIGHTS, named.taken_off)
        _load_all(model, named.tensors if named.library == "timm" else maps_as_in(config, named.tensors))
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"{directory / WEIGHTS}: not the weights of the {config.attention} model in {CONFIG}: {error}"
        ) from error
    model.trained_on = trained_on
    return model


def _tell_taken_off(file: Path, prefix: str) -> None:
    if prefix:
        print(f"{file}: {prefix} taken off the names of the weights", file=sys.stderr)


def _load_all(model: ViT, tensors: StateDict) -> None:
    """Load weights of which none is missing, none is left over, and all are of the model's shapes."""
    require_all(stored_once(model), tensors, aliases=model.state_dict())
    model.load_state_dict(tensors, strict=False)


def require_all(wanted: StateDict, tensors: StateDict, aliases: Iterable[str] = ()) -> None:
    """Raise ``UserError`` where a weight is missing, left over (``aliases`` may be there), or of another shape."""
    problems = [
        f"{name} is of shape {tuple(tensor.shape)}, here {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if missing := together(sorted(wanted.keys() - tensors.keys())):
        problems.append(f"{missing} missing")
    if left_over := together(sorted(tensors.keys() - wanted.keys() - set(aliases))):
        problems.append(f"{left_over} left over")
    if problems:
        raise UserError("; ".join(problems))


def _load_other(source: Source, num_attention_heads: int | None) -> ViT:
    """A model of the shape that weights of another library tell, with ``fused`` attention."""
    path, shape, told = source.weights.path, source.shape, source.told
    heads = told.num_attention_heads or num_attention_heads
    if heads is None:
        raise UserError(f"{path}: weights do not record the number of heads; give num_attention_heads=")
    if shape.num_classes is None:
        raise UserError(f"{path}: no head.weight, hence no classes; expected the weights of a classifier")
    height, width = shape.image_shape
    try:
        config = ViTConfig(
            image_size=height if height == width else (height, width),
            num_classes=shape.num_classes,
            num_attention_heads=heads,
            qkv_bias=shape.qkv_bias,
            layer_norm_eps=told.layer_norm_eps or _USUAL_EPSILON[source.named.library],
            **{name: getattr(shape, name) for name in COMPARED},
        )
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from error
    model = ViT(config)
    report = start_with(source, model)
    _tell_taken_off(source.weights.file, report.taken_off)
    if report.fresh:
        raise UserError(f"{path}: {together(report.fresh)} missing; expected all weights of a classifier")
    about = told.trained_on
    try:
        about.check(config.num_classes, config.num_channels)
        model.trained_on = about
    except UserError:  # it tells of what the model was trained on before
        model.trained_on = TrainedOn()
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DistributedDataParallel and the like."""
    inner: Any = model
    while type(inner).__name__ in _WRAPPERS:
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return inner


def _require_as_configured(model: ViT) -> None:
    """Raise ``UserError`` where the weights are not those of a model that is built from its configuration."""
    with torch.device("meta"):
        built = ViT(model.config)
    for block, (here, configured) in enumerate(zip(model.attentions(), built.attentions(), strict=False)):
        if not isinstance(here, type(configured)):
            raise UserError(
                f"save_model: block {block} has {type(here).__name__}, the configuration says "
                f"{model.config.attention}; save its state dict instead"
            )
    wanted, there = ({n: t.shape for n, t in each.state_dict().items()} for each in (built, model))
    if differ := [name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)]:
        raise UserError(
            f"save_model: {together(sorted(differ))}: not as in a ViT of this configuration "
            f"(attention={model.config.attention}); save its state dict instead"
        )
    kinds = [[(type(attention), attention.options) for attention in each.attentions()] for each in (built, model)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"save_model: not all blocks have {model.config.attention} attention with these options, as its "
            "configuration says; save its state dict instead"
        )
