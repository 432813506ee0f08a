"""Images in a folder tree: ``train/<class>/*`` and ``test/<class>/*``."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from effvit.data.images import read_image
from effvit.data.source import Source, Split
from effvit.errors import UserError

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


def has_tree(root: Path) -> bool:
    """Whether ``root`` is meant as a folder tree."""
    return (root / "train").is_dir() or (root / "test").is_dir()


def folder(root: Path, image_size: int) -> Source:
    """Read the tree below ``root``; classes are the folders' names in sorted order.

    Images of any size and colour mode become RGB, ``image_size`` pixels square (shorter side resized, centre cropped).
    Dot-files and what operating systems strew about (``Thumbs.db``, ``desktop.ini``, ``__MACOSX``) are ignored and
    counted; anything else that is not an image of a class is a `UserError` that names it, as are a class without
    images, one that train and test do not share, and (while reading) a damaged image.
    """
    listings = {}
    ignored: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for split, counter in ignored.items():
        if not (root / split).is_dir():
            raise UserError(f"{root}: expected train/<class>/ and test/<class>/ with images, found no {split}/")
        listings[split] = _list_classes(root / split, counter)
    _check_same_classes(root, listings["train"], listings["test"])
    train, test = (_split(listings[split], image_size, ignored[split]) for split in ("train", "test"))
    return Source("folder tree train/<class>, test/<class>", tuple(listings["train"]), train, test)


def _list_classes(directory: Path, ignored: Counter[str]) -> dict[str, list[Path]]:
    classes = {}
    for path in _entries(directory, ignored):
        if not path.is_dir():
            raise UserError(f"{path}: expected only folders of classes here; move or remove this file")
        if path.name.encode(errors="replace").decode() != path.name:
            raise UserError(f"{path}: the name of a class must be valid UTF-8; rename this folder")
        classes[path.name] = files = _entries(path, ignored)
        if not files:
            raise UserError(f"class {path.name!r} has no images: {path} is empty")
        for file in files:
            if not file.is_file():  # reading a FIFO, for one, never ends
                found = "a folder" if file.is_dir() else "something else"
                raise UserError(f"{file}: expected image files in a class's folder, found {found}")
    return classes


def _entries(directory: Path, ignored: Counter[str]) -> list[Path]:
    kept = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LITTER:
            ignored["stray files ignored"] += 1
        else:
            kept.append(path)
    return kept


def _check_same_classes(root: Path, train: dict[str, list[Path]], test: dict[str, list[Path]]) -> None:
    for name in train:
        if name not in test:
            raise UserError(f"class {name!r} is missing from test: {root / 'train' / name} has no test counterpart")
    for name in test:
        if name not in train:
            raise UserError(f"class {name!r} is missing from train: {root / 'test' / name} has no train counterpart")
    if len(train) < 2:
        raise UserError(f"{root / 'train'}: expected at least 2 classes, found {len(train)}")


def _split(classes: dict[str, list[Path]], image_size: int, notes: Counter[str]) -> Split:
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in classes.values()])
    paths = [path for files in classes.values() for path in files]
    return Split(labels, _read(paths, image_size, notes), notes)


def _read(paths: list[Path], image_size: int, notes: Counter[str]) -> Iterator[np.ndarray]:
    for path in paths:
        image, done = read_image(path, image_size)
        notes.update(done)
        yield image
