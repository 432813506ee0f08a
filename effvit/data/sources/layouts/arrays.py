"""Images as arrays in one ``.npz``: MedMNIST's ``train_images``, ``val_images`` ..., or ``x_train``, ``y_train``."""

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from effvit.data.sources.base import Split
from effvit.data.sources.images import fit
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.names import TEST, TRAIN, VALIDATION
from effvit.data.sources.reading import reading
from effvit.data.sources.tree import Directory, Tree
from effvit.errors import UserError

_KEYS = {
    TRAIN: (("train_images", "train_labels"), ("x_train", "y_train")),
    VALIDATION: (("val_images", "val_labels"), ("x_val", "y_val")),
    TEST: (("test_images", "test_labels"), ("x_test", "y_test")),
}


def arrays(tree: Tree, choices: Choices, image_size: int) -> Layout | str | None:
    """Recognise a single ``.npz`` with images and labels of each part; of one with other arrays, return what it has.

    Images are uint8 ``(n, H, W)`` or ``(n, H, W, 1 or 3)``, labels integers ``(n,)`` or ``(n, 1)``. They are read one
    by one, and never unpickled. A part without labels is left out, and the description says so.
    """
    if not isinstance(tree, Directory):
        return None
    found = {name: _names(tree.root / name) for name in tree.files() if name.lower().endswith(".npz")}
    files = [name for name, names in found.items() if any(set(pair) <= set(names) for pair in _KEYS[TRAIN])]
    if len(files) > 1:
        raise UserError(
            f"root={tree.root}: holds {len(files)} .npz files; name one as root, as root={tree.root / files[0]}"
        )
    if not files:
        return next((_other_arrays(*pair) for pair in found.items()), None)
    path, names = tree.root / files[0], found[files[0]]
    chosen = {part: pair for part, pairs in _KEYS.items() for pair in pairs if set(pair) <= set(names)}
    unread = [
        f", {images} not read (no {labels})"
        for part, pairs in _KEYS.items()
        for images, labels in pairs
        if images in names and part not in chosen
    ]
    labels = {part: _labels(path, pair[1]) for part, pair in chosen.items()}
    for part, (name, _) in chosen.items():
        _check_images(path, name, len(labels[part]))
    classes = np.unique(np.concatenate(list(labels.values()))).tolist()

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        return {part: _split(path, name, image_size, labels[part], wanted) for part, (name, _) in chosen.items()}

    described = f"arrays {', '.join(pair[0] for pair in chosen.values())} of an .npz{''.join(unread)}"
    return Layout(described, tuple(map(str, classes)), read)


def _names(path: Path) -> list[str]:
    with reading(path, "damaged or not an .npz"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _other_arrays(file: str, names: Sequence[str]) -> str:
    return (
        f"{file} has the arrays {', '.join(names) or 'none'}; expected train_images, train_labels, test_images, "
        "test_labels, as MedMNIST has them"
    )


def _labels(path: Path, name: str) -> np.ndarray:
    with _open(path, name) as (file, shape, kind):
        if len(shape) == 2 and shape[1] > 1:
            raise UserError(
                f"{path}: {name} has {shape[1]} labels for each image (multi-label); expected one, as (n, 1)"
            )
        if kind.kind not in "iu" or len(shape) not in (1, 2):
            raise UserError(f"{path}: {name} is {kind} {shape}, expected integers (n,) or (n, 1)")
        return np.frombuffer(_read(file, shape[0] * kind.itemsize, path, name), kind).astype(np.int64)


def _check_images(path: Path, name: str, count: int) -> None:
    with _open(path, name) as (_, shape, kind):
        pass
    channels = shape[3] if len(shape) == 4 else 1
    if kind != np.uint8 or len(shape) not in (3, 4) or channels not in (1, 3) or min(shape) < 1:
        raise UserError(f"{path}: {name} is {kind} {shape}, expected uint8 (n, H, W), (n, H, W, 1) or (n, H, W, 3)")
    if shape[0] != count:
        raise UserError(f"{path}: {name} has {shape[0]} images for {count} labels")


@dataclass(frozen=True)
class _Stream:
    """The images of one array at the indices ``rows``, read in order: uint8 ``(image_size, image_size, 3)``."""

    path: Path
    name: str
    image_size: int
    rows: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        wanted = set(self.rows.tolist())
        with _open(self.path, self.name) as (file, shape, _):
            for row in range(shape[0]):
                pixels = _read(file, shape[1] * shape[2] * (shape[3] if len(shape) == 4 else 1), self.path, self.name)
                if row in wanted:
                    image = np.frombuffer(pixels, np.uint8).reshape(shape[1:] if shape[-1] == 3 else shape[1:3])
                    fitted = fit(Image.fromarray(image), self.image_size)
                    yield fitted if fitted.ndim == 3 else np.repeat(fitted[:, :, None], 3, axis=2)


def _split(path: Path, name: str, size: int, labels: np.ndarray, wanted: Sequence[str]) -> Split:
    index = {name: number for number, name in enumerate(wanted)}
    new = np.array([index.get(str(value), -1) for value in labels], dtype=np.int64)
    rows = np.flatnonzero(new >= 0)
    with _open(path, name) as (_, shape, _):
        notes = Counter({"grayscale converted to RGB": len(rows)} if shape[3:] != (3,) else {})
        notes.update({"resized": len(rows)} if shape[1:3] != (size, size) else {})
    return Split(new[rows], _Stream(path, name, size, rows), notes)


@contextmanager
def _open(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """The data of an array in the ``.npz``, its shape and type; raises `UserError` where it is damaged."""
    with (
        reading(path, "damaged or not an array of numbers"),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{name}.npy") as file,
    ):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(file)
        if kind.hasobject or (fortran and len(shape) > 1):
            raise ValueError(f"{name} holds objects or is in Fortran order")
        yield file, shape, kind


def _read(file: IO[bytes], size: int, path: Path, name: str) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise UserError(f"{path}: {name} is cut short; fetch it again")
    return content
