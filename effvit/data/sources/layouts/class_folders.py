"""A folder for each class: ``train/<class>/*`` and ``test``, ``val`` or ``validation``; or without a split."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.images import FORMATS, FORMATS_TEXT, is_image
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.members import TooLarge
from effvit.data.sources.names import TEST, TRAIN, VALIDATION, WHOLE, other_form
from effvit.data.sources.tree import Kind, Tree, join
from effvit.errors import UserError, did_you_mean

_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation"),
    TEST: ("test", "testing"),
}
_NUMBERED = re.compile(r"\.X\d*")  # Kaggle's ImageNet-100: train.X1 to train.X4 and val.X
_WNID = re.compile(r"n\d{8}")
_DEEPEST = 16

Listing = dict[str, list[str]]
"""The files of each class as paths of the tree, classes and files in sorted order."""


def split_folders(tree: Tree, choices: Choices) -> Layout | str | None:
    """Recognise ``train/<class>`` and at least one more part; without one, return what is missing.

    A test or validation part without folders of classes has no labels. It is left out, and the description says so,
    unless no other is there.
    """
    parts = find_parts(tree)
    if TRAIN not in parts or not any(tree.folders(folder) for folder in parts[TRAIN]):
        return None
    train = set(class_names(tree, parts[TRAIN], choices.label_level))
    unread = {part: parts.pop(part) for part in (VALIDATION, TEST) if _has_no_labels(tree, parts.get(part, []), train)}
    if unread and len(parts) == 1 and choices.test_share is None:
        return _unlabelled(tree, next(iter(unread.values()))[0], train)
    if len(parts) == 1 and choices.test_share is None:
        return _no_test(tree, parts[TRAIN])
    names = {part: class_names(tree, folders, choices.label_level) for part, folders in parts.items()}
    classes = sorted({name for found in names.values() for name in found})
    described = ", ".join(f"{folder}/<class>" for folders in parts.values() for folder in folders)
    for folders in unread.values():
        for folder in folders:
            described += f", {folder}/ not read ({len(tree.files(folder)):,} files without folders of classes)"
    level = f" at level {choices.label_level}" if choices.label_level > 1 else ""

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        check_same_classes(tree, parts, names, wanted)
        return {part: list_split(tree, folders, wanted, choices.label_level) for part, folders in parts.items()}

    return Layout(f"folder tree {described}{level}", tuple(classes), read, takes=("label_level",))


def whole_folders(tree: Tree, choices: Choices) -> Layout | str | None:
    """Recognise ``<class>/*`` without a split: at least two folders, each with images and without parts of its own.

    Where only some of them have images, return which do not.
    """
    folders = tree.folders()
    if len(folders) < 2 or find_parts(tree) or any(find_parts(tree.within(folder)) for folder in folders):
        return None
    empty = [folder for folder in folders if not has_image(tree, folder)]
    if empty:
        others = [f"{folder}/" for folder in folders if folder not in empty]
        if len(others) < 2:
            return None
        return (
            f"{len(others)} folders have images ({', '.join(others[:3])}), and {empty[0]}/ has none; each must have "
            "some to be a class, so move it away or fill it"
        )
    classes = class_names(tree, [""], choices.label_level)

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        return {WHOLE: list_split(tree, [""], wanted, choices.label_level)}

    return Layout("folder tree <class>", tuple(classes), read, takes=("label_level",))


def has_class_folders(tree: Tree) -> bool:
    """Whether there is a folder with images in one for training."""
    train = find_parts(tree).get(TRAIN, [])
    return any(has_image(tree, join(folder, name)) for folder in train for name in tree.folders(folder))


def find_parts(tree: Tree) -> dict[str, list[str]]:
    """The folders of each part that is there, by their usual names in any case.

    Raises:
        UserError: a part is there under two names.
    """
    folders = tree.folders()
    parts: dict[str, list[str]] = {}
    for part, names in _NAMES.items():
        found = [folder for folder in folders if _NUMBERED.sub("", folder).lower() in names]
        if len({_NUMBERED.sub("", folder) for folder in found}) > 1:
            raise UserError(
                f"root={tree.root}: {' and '.join(f'{name}/' for name in found)} are there, expected one of them"
            )
        if found:
            parts[part] = found
    return parts


def class_names(tree: Tree, folders: Sequence[str], level: int = 1) -> list[str]:
    """Names of the folders ``level`` levels below ``folders``, sorted, each once.

    Raises:
        UserError: there is no folder so deep; of the folders at a deeper level two in different places share a name.
    """
    places: dict[str, str] = {}
    for top in folders:
        paths = [""]
        for _ in range(level):
            paths = [join(path, name) for path in paths for name in tree.folders(join(top, path))]
        for path in paths:
            name = path.rpartition("/")[2]
            if name.encode(errors="replace").decode() != name:
                raise UserError(
                    f"{tree.root / top / path}: the name of a class must be valid UTF-8; rename this folder"
                )
            if places.setdefault(name, path) != path:
                raise UserError(f"{tree.root / top}: class {name!r} is in {places[name]} and in {path}; rename one")
    if level > 1 and not places:
        raise UserError(
            f"label_level={level}: {tree.root} has no folders {level} levels below {', '.join(folders) or '.'}"
        )
    return sorted(places)


def _has_no_labels(tree: Tree, folders: Sequence[str], train: Collection[str]) -> bool:
    """Whether a part that is there has no folders of classes; a single folder of another name is none, as Kaggle's."""
    if not folders:
        return False
    found = {name for folder in folders for name in tree.folders(folder)}
    return not found or (len(found) == 1 and len(train) > 1 and not found & set(train))


def _unlabelled(tree: Tree, folder: str, train: Collection[str]) -> str:
    count = sum(entry.kind is Kind.FILE for entry in tree.entries(folder))
    inside = tree.folders(folder)
    found = f"{count:,} files" if count else f"the folder {inside[0]}/" if inside else "nothing"
    of_imagenet = any(map(_WNID.fullmatch, train))
    instead = (
        "for ImageNet's val, put LOC_val_solution.csv or ILSVRC2012_devkit_t12 next to it"
        if of_imagenet
        else "or add a CSV of its images and their classes"
    )
    return (
        f"{folder}/: expected a folder for each class, with its images; found {found}; {instead}; to divide train/ "
        "instead, add test_share=0.2"
    )


def _no_test(tree: Tree, train: Sequence[str]) -> str:
    others = [name for name in tree.folders() if name not in train]
    meant = next(
        (f" (is {name}/ meant?)" for name in others if did_you_mean(name.lower(), ("test", "val", "valid"))), ""
    )
    return f"found {train[0]}/ and no test/ or val/{meant}; add it, or test_share=0.2 to divide {train[0]}/"


def has_image(tree: Tree, path: str, depth: int = 0) -> bool:
    """Whether there is an image in a folder or the folders in it."""
    entries = tree.entries(path)
    if any(entry.kind is Kind.FILE and is_image_in(tree, join(path, entry.name)) for entry in entries):
        return True
    return depth < _DEEPEST and any(
        entry.kind is Kind.FOLDER and has_image(tree, join(path, entry.name), depth + 1) for entry in entries
    )


def is_image_in(tree: Tree, path: str) -> bool:
    """Whether a file of the tree is meant as an image; what is larger than any image in an archive is none."""
    try:
        return is_image(path, partial(tree.open, path))
    except TooLarge:
        return False


def check_same_classes(
    tree: Tree, parts: Mapping[str, Sequence[str]], names: Mapping[str, Collection[str]], wanted: Sequence[str]
) -> None:
    """Raise `UserError` where a part lacks one of the classes ``wanted``."""
    for name in wanted:
        there = next(part for part in parts if name in names[part])
        for part in parts:
            if name not in names[part]:
                missing, has = ("/, ".join(parts[each]) for each in (part, there))
                hint = other_form(name, names[part]) or did_you_mean(name, set(names[part]) - set(names[there]))
                raise UserError(
                    f"class {name!r} is missing from {missing}: {tree.root / has / name} has no {missing} "
                    f"counterpart{hint}"
                )


def list_split(tree: Tree, folders: Sequence[str], wanted: Sequence[str], level: int = 1) -> Split:
    """The images of the classes ``wanted`` in ``folders``, class by class, as `list_classes` finds them."""
    notes: Counter[str] = Counter()
    listing = list_classes(tree, folders, notes, wanted, level)
    return Split(labels_of(listing), tree.originals([path for files in listing.values() for path in files]), notes)


def labels_of(listing: Listing) -> np.ndarray:
    """The label of each file in a listing: int64 ``(n,)``."""
    return np.repeat(np.arange(len(listing), dtype=np.int64), [len(files) for files in listing.values()])


def list_classes(
    tree: Tree, folders: Iterable[str], notes: Counter[str], wanted: Sequence[str], level: int = 1
) -> Listing:
    """Files of the classes ``wanted`` in ``folders``, whose folders are ``level`` levels below.

    A file with an image's suffix is an image, and so is any other that begins like one. The rest is ignored and
    counted in ``notes``: files of other formats, files next to the folders of classes, and what operating systems strew
    about. Images in folders within a class's folder are of that class, and are counted too.

    Raises:
        UserError: a class without images, or what is no file, no folder, or a link that leads nowhere.
    """
    listing: Listing = {name: [] for name in wanted}
    for folder in folders:
        paths = [folder]
        for depth in range(level):
            entries = [(path, entry) for path in paths for entry in tree.entries(path, notes)]
            for path, entry in entries:
                if entry.kind is Kind.LINK:
                    raise UserError(f"{tree.root / path / entry.name}: a link that leads nowhere; mend or remove it")
                if entry.kind is not Kind.FOLDER:
                    if depth and is_image_in(tree, join(path, entry.name)):
                        raise UserError(
                            f"label_level={level}: {tree.root / path / entry.name} is an image above the folders of "
                            f"classes; label_level={depth} makes {path.rpartition('/')[2]} its class"
                        )
                    notes["stray files ignored"] += 1
            paths = [join(path, entry.name) for path, entry in entries if entry.kind is Kind.FOLDER]
        for path in paths:
            name = path.rpartition("/")[2]
            if name in listing:
                listing[name] += list_images(tree, path, notes)
    return {name: sorted(files) for name, files in listing.items()}


def list_images(tree: Tree, path: str, notes: Counter[str]) -> list[str]:
    """Paths of the images in a class's folder and the folders in it."""
    found: Counter[str] = Counter()
    files = list(_walk(tree, path, notes, found))
    if found["nested"]:
        notes["images in folders within their class's folder"] += found["nested"]
    if found["other"]:
        notes[f"files that are no {FORMATS_TEXT} ignored"] += found["other"]
    if not files:
        what = f"has {found['other']} other files" if found["other"] else "is empty"
        name = path.rpartition("/")[2]
        raise UserError(f"class {name!r} has no images ({', '.join(FORMATS)}): {tree.root / path} {what}")
    return files


def _walk(tree: Tree, path: str, notes: Counter[str], found: Counter[str], depth: int = 0) -> Iterable[str]:
    if depth > _DEEPEST:
        raise UserError(f"{tree.root / path}: folders in folders {depth} levels deep; does a link lead back?")
    for entry in tree.entries(path, notes):
        inner = join(path, entry.name)
        if entry.kind is Kind.FOLDER:
            yield from _walk(tree, inner, notes, found, depth + 1)
        elif entry.kind is not Kind.FILE:  # reading a FIFO, for one, never ends
            what = "a link that leads nowhere" if entry.kind is Kind.LINK else "something else"
            raise UserError(f"{tree.root / inner}: expected image files in a class's folder, found {what}")
        elif is_image_in(tree, inner):
            found["nested"] += depth > 0
            yield inner
        else:
            found["other"] += 1
