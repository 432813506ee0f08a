"""Images in a folder tree: ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``."""

import io
import os
from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from effvit.data.sources.base import Files, Source, Split, default_root
from effvit.data.sources.images import FORMATS, FORMATS_TEXT, is_image
from effvit.errors import UserError

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}

Listing = dict[str, list[str]]
"""The files of each class, as paths below the root, classes and files in sorted order."""


def folder(root: Path | None, image_size: int, classes: Path | None = None) -> Source:
    """The tree below ``root``, by default `default_root`; classes are the folders' names in sorted order.

    ``classes`` is a file with the names of those to take, one a line. The test split is ``test``, or where there is
    none ``val``; validation is held out of ``train`` in either case. `list_classes` says what counts as an image.

    Raises:
        UserError: a class without images, one that train and test do not share, or fewer than two; while the images
            are read, one that is damaged.
    """
    return read_tree(root or default_root("folder"), read_class_list(classes) if classes else None)


def has_tree(root: Path) -> bool:
    """Whether ``root`` is meant as a folder tree."""
    return any((root / name).is_dir() for name in ("train", "test", "val"))


def read_tree(root: Path, wanted: Collection[str] | None = None) -> Source:
    """Read a folder tree as `folder` does, with the classes ``wanted`` or all."""
    test = "test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val"
    for name in ("train", test):
        if not (root / name).is_dir():
            raise UserError(f"{root}: expected train/<class>/ and test/<class>/ with images, found no {name}/")
    unread = ", val/ not read" if test == "test" and (root / "val").is_dir() else ""
    return build_source(f"folder tree train/<class>, {test}/<class>{unread}", root, ["train"], [test], wanted)


def build_source(
    description: str, root: Path, train: Iterable[str], test: Iterable[str], wanted: Collection[str] | None = None
) -> Source:
    """A source of the folders of classes in the folders ``train`` and ``test``, both names below ``root``.

    Args:
        description: what kind of source it is.
        root: where all the files are.
        train: folders that hold training images together.
        test: folders that hold test images together.
        wanted: classes to take; all by default.

    Raises:
        UserError: as `folder` does, or a wanted class is not there.
    """
    notes: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    train, test = list(train), list(test)
    listings = [list_classes(root, names, noted, wanted) for names, noted in zip((train, test), notes, strict=True)]
    _check_same_classes(root, ", ".join(train), listings[0], ", ".join(test), listings[1])
    splits = [_split(root, listing, noted) for listing, noted in zip(listings, notes, strict=True)]
    return Source(description, tuple(listings[0]), *splits)


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names in a text file, one a line; raises `UserError` where there is none or one twice."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file with one class a line") from error
    names = tuple(filter(None, map(str.strip, lines)))
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{path}: class {name!r} is named {count} times")
    if not names:
        raise UserError(f"{path}: expected one class a line, found none")
    return names


def list_classes(
    root: Path, names: Iterable[str], notes: Counter[str], wanted: Collection[str] | None = None
) -> Listing:
    """Files of each class in the folders ``names`` below ``root``.

    A file with an image's suffix is an image, and so is any other that begins like one. The rest is ignored and
    counted in ``notes``: files of other formats, files next to the folders of classes, and what operating systems strew
    about (dot-files, ``Thumbs.db``, ``desktop.ini``, ``__MACOSX``).

    Raises:
        UserError: no classes, a class without images, or a folder where an image was expected.
    """
    classes: Listing = {}
    for name in names:
        entries = _entries(root / name, notes)
        if not any(entry.is_dir() for entry in entries):
            found = f"{len(entries)} files" if entries else "nothing"
            raise UserError(f"{root / name}: expected a folder for each class, with its images; found {found}")
        for entry in entries:
            if not entry.is_dir():
                notes["stray files ignored"] += 1
            elif wanted is None or entry.name in wanted:
                classes.setdefault(entry.name, []).extend(f"{name}/{entry.name}/{f}" for f in _images(entry, notes))
    for name in wanted or ():
        if name not in classes:
            raise UserError(f"class {name!r} is wanted, but there is no folder {root}/{'|'.join(names)}/{name}")
    return {name: sorted(classes[name]) for name in sorted(classes)}


def _images(directory: "os.DirEntry[str]", notes: Counter[str]) -> list[str]:
    if directory.name.encode(errors="replace").decode() != directory.name:
        raise UserError(f"{directory.path}: the name of a class must be valid UTF-8; rename this folder")
    files, others = [], 0
    for entry in _entries(Path(directory), notes):
        if not entry.is_file():  # reading a FIFO, for one, never ends
            found = "a folder" if entry.is_dir() else "something else"
            raise UserError(f"{entry.path}: expected image files in a class's folder, found {found}")
        if is_image(entry.name, partial(io.FileIO, entry.path)):
            files.append(entry.name)
        else:
            others += 1
    if others:
        notes[f"files that are no {FORMATS_TEXT} ignored"] += others
    if not files:
        found = f"has {others} other files" if others else "is empty"
        raise UserError(f"class {directory.name!r} has no images ({', '.join(FORMATS)}): {directory.path} {found}")
    return files


def _entries(directory: Path, notes: Counter[str]) -> "list[os.DirEntry[str]]":
    with os.scandir(directory) as entries:
        found = list(entries)
    kept = [entry for entry in found if not (entry.name.startswith(".") or entry.name.lower() in _LITTER)]
    if len(kept) < len(found):
        notes["stray files ignored"] += len(found) - len(kept)
    return kept


def _check_same_classes(root: Path, train_name: str, train: Listing, test_name: str, test: Listing) -> None:
    for here, classes, there, others in ((train_name, train, test_name, test), (test_name, test, train_name, train)):
        for name in classes:
            if name not in others:
                raise UserError(
                    f"class {name!r} is missing from {there}: {root / here / name} has no {there} counterpart"
                )
    if len(train) < 2:
        raise UserError(f"{root / train_name}: expected at least 2 classes, found {len(train)}")


def _split(root: Path, classes: Listing, notes: Counter[str]) -> Split:
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in classes.values()])
    return Split(labels, Files(root, tuple(path for files in classes.values() for path in files)), notes)
