"""What a source of images hands to the writer: labels at once, images one by one or still encoded."""

import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import platformdirs


@runtime_checkable
class Originals(Protocol):
    """Encoded images in a fixed order, which the writer reads: files, members of an archive, rows of a table.

    They are pickled for worker processes, so that what is open is opened in each. Reading is fastest in order.
    """

    @property
    def root(self) -> Path:
        """The file or folder that `name` is relative to."""

    def __len__(self) -> int:
        """How many images."""

    def name(self, index: int) -> str:
        """Where the image is below ``root``: ``train/cat/1.jpg``, ``train.parquet[17]``."""

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UserError: there is none, or what holds it is damaged.
        """

    def take(self, rows: np.ndarray) -> "Originals":
        """The images at the indices ``rows``, in that order."""

    def stamp(self) -> list[Any]:
        """What changes when an image does, as JSON: the root, files by name, size and time, rows by number."""


@dataclass(frozen=True)
class Files:
    """Image files: paths below ``root``, with slashes."""

    root: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        with io.FileIO(f"{self.root}/{self.paths[index]}") as file:  # a third of the time that a Path takes
            return file.readall()

    def take(self, rows: np.ndarray) -> "Files":
        return Files(self.root, tuple(self.paths[row] for row in rows))

    def stamp(self) -> list[Any]:
        return [str(self.root.absolute()), *(stamp_of(self.root, path) for path in self.paths)]


def stamp_of(root: Path, path: str) -> list[Any]:
    """A file's name, size and time."""
    stat = os.stat(f"{root}/{path}" if path else root)  # noqa: PTH116  # a Path takes several times as long
    return [path, stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class Split:
    """Labelled images of one split.

    ``labels`` is int64 ``(n,)``. ``images`` are n encoded images, or yields n uint8 arrays
    ``(image_size, image_size, 3)`` in the same order, so that memory stays bounded. ``notes`` counts what was done to
    them ("resized": 12), apart from what the writer does to encoded ones. It is complete once ``images`` is exhausted.
    """

    labels: np.ndarray
    images: Originals | Iterable[np.ndarray]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """A data set before it is prepared; ``description`` says where it came from, without local paths.

    ``validation`` are the rows of ``train`` that are a validation part of the source's own, int64; None where there is
    none, and some of ``train`` are held out.
    """

    description: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: np.ndarray | None = None


def default_root(name: str) -> Path:
    """Where the files of data set ``name`` are kept: ``$EFFVIT_DATA/<name>``, else in the user's cache directory."""
    base = os.environ.get("EFFVIT_DATA")
    parent = Path(base).expanduser() if base else platformdirs.user_cache_path("effvit", appauthor=False)
    return parent / name
