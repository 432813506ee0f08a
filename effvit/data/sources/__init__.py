"""Data sets, one file each, and the registry that names them.

A source is a function ``name(root, image_size, choices) -> Source`` (see `effvit.data.sources.base`) in the module
named here; adding one takes a file and a line of ``_SOURCES``. Those of ``_CHOOSE_CLASSES`` take a file of classes.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from effvit.data.sources.layout import BY_CONTENT, Choices
from effvit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from effvit.data.sources.base import Source

_SOURCES = {
    "digits": "effvit.data.sources.digits",
    "cifar10": "effvit.data.sources.cifar",
    "cifar100": "effvit.data.sources.cifar",
    "imagenet100": "effvit.data.sources.imagenet100",
    "folder": "effvit.data.sources.folder",
}
_CHOOSE_CLASSES = ("imagenet100", "folder")


def available_datasets() -> tuple[str, ...]:
    """Names of all data sets."""
    return tuple(_SOURCES)


def check_name(name: str, classes: Path | None) -> None:
    """Raise ``UserError`` where no data set has that name, or it takes no choice of classes."""
    if name not in _SOURCES:
        known = ", ".join(_SOURCES)
        raise UserError(f"dataset={name!r}: unknown data set, expected one of {known}{did_you_mean(name, _SOURCES)}")
    if classes and name not in _CHOOSE_CLASSES:
        raise UserError(f"classes={classes}: {name} has its own; only {' and '.join(_CHOOSE_CLASSES)} take a choice")


def open_source(name: str, root: Path | None, image_size: int, choices: Choices = BY_CONTENT) -> "Source":
    """Find the images of data set ``name`` at ``root``, or where the source keeps them.

    Raises:
        UserError: files that are missing, damaged or not what the source expects.
    """
    return getattr(import_module(_SOURCES[name]), name)(root, image_size, choices)
