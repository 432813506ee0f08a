"""A trained model on disk: ``model.safetensors`` and ``config.json`` in one directory."""

import json
import re
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save as to_safetensors

from effvit.errors import UserError, explain
from effvit.files import write_json
from effvit.model.vit import ViT, ViTConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def is_mixed(model: ViT) -> bool:
    """Whether blocks differ in attention, or in its options, which a configuration cannot say."""
    first, *others = model.attentions()
    return any(type(each) is not type(first) or each.options != first.options for each in others)


def save_model(model: ViT, directory: Path) -> None:
    """Write the model's weights and configuration into an existing directory.

    Raises:
        UserError: blocks differ in attention.
    """
    if is_mixed(model):
        raise UserError("save_model: blocks differ in attention, which a configuration cannot say; keep the state dict")
    once = dict((*model.named_parameters(), *model.named_buffers()))  # a shared tensor under its first name only
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in once}
    # Written here, as safetensors' own writer tells of a full disk in an error that is no OSError.
    (directory / WEIGHTS).write_bytes(to_safetensors(tensors))
    write_json(directory / CONFIG, model.config.model_dump())


def is_model_dir(directory: Path) -> bool:
    """Whether the directory is what a training wrote, and no more: whether it can be replaced at no one's loss.

    Others have a ``config.json`` too, some beside a ``model.safetensors``: theirs does not read as a `ViTConfig`.
    """
    try:
        others = {path.name for path in directory.iterdir()} - {WEIGHTS, CONFIG}
        values = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        ViTConfig(**values)
    except (OSError, ValueError, TypeError):
        return False
    whole = "attention" in values and (directory / WEIGHTS).is_file()  # {} reads as well: all has a default
    return whole and all(re.fullmatch(r"epoch-\d+", name) and is_model_dir(directory / name) for name in others)


def load_model(directory: Path | str, device: str | torch.device = "cpu") -> ViT:
    """Give back a trained model, in eval mode.

    Raises:
        UserError: a file is missing or damaged, or the weights are not those of the configuration.
    """
    directory = Path(directory)
    for name in (WEIGHTS, CONFIG):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: no such file; a model directory is what `effvit train` writes")
    try:
        model = ViT(ViTConfig(**json.loads((directory / CONFIG).read_text(encoding="utf-8"))))
    except ValidationError as error:
        raise UserError(f"{directory / CONFIG}: {explain(error)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{directory / CONFIG}: not the JSON of a model's configuration ({error})") from error
    try:
        load_safetensors(model, str(directory / WEIGHTS))
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS}: not a whole safetensors file ({error})") from error
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"{directory / WEIGHTS}: not the weights of the {model.config.attention} model in {CONFIG}: {error}"
        ) from error
    return model.to(device).eval()
