"""What a source of images hands to the writer: labels at once, images one by one or as files."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import platformdirs


@dataclass(frozen=True)
class Files:
    """Image files that the writer is to read: paths below ``root``."""

    root: Path
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Labelled images of one split.

    ``labels`` is int64 ``(n,)``; ``images`` are n files, or yields n uint8 arrays ``(image_size, image_size, 3)`` in
    the same order, so that memory stays bounded; ``notes`` counts what was done to them ("resized": 12), apart from
    what the writer does to files, and is complete once ``images`` is exhausted.
    """

    labels: np.ndarray
    images: Files | Iterable[np.ndarray]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """A data set before it is prepared; ``description`` says where it came from, without local paths."""

    description: str
    classes: tuple[str, ...]
    train: Split
    test: Split


def default_root(name: str) -> Path:
    """Where the files of data set ``name`` are kept: ``$EFFVIT_DATA/<name>``, else in the user's cache directory."""
    base = os.environ.get("EFFVIT_DATA")
    parent = Path(base).expanduser() if base else platformdirs.user_cache_path("effvit", appauthor=False)
    return parent / name
