"""A model's ``config.json``: its configuration, with what it was trained on where that is known."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from effvit.errors import UserError, explain
from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViTConfig

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
OTHERS_MARK = {"class", "towers"}
_MARK = "attention"  # a key that no other library's file has, and all of ours have


def settings_of(config: ViTConfig, trained_on: TrainedOn) -> dict[str, Any]:
    """Return what ``config.json`` says of a model."""
    return config.model_dump() | trained_on.known()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not the JSON of a model's configuration ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: not the JSON of a model's configuration (holds {type(values).__name__})")
    return values


def is_ours(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one of this package, to be read by ``parse``."""
    return _MARK in values


def is_of_other(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one that ``save_model`` wrote of another library's model."""
    return values.keys() >= OTHERS_MARK


def parse(file: Path, values: dict[str, Any]) -> tuple[ViTConfig, TrainedOn]:
    """Return what ``file``, which holds ``values``, says of a model.

    Raises:
        UserError: a value is wrong, unknown or does not fit the others.
    """
    about = {key: values[key] for key in TrainedOn.model_fields if key in values}
    try:
        config = ViTConfig(**{key: value for key, value in values.items() if key not in about})
        trained_on = TrainedOn(**about)
        trained_on.check(config.num_classes, config.num_channels)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error)}") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config, trained_on
