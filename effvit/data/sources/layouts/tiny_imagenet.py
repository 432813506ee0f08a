"""Tiny-ImageNet as downloaded: ``train/<wnid>/images/*``, ``val/images/*`` and ``val/val_annotations.txt``."""

from collections import Counter

from effvit.data.sources.base import Split
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.layouts.class_folders import Listing, class_names, labels_of, list_images, list_split
from effvit.data.sources.layouts.titles import read_titles
from effvit.data.sources.names import TEST, TRAIN
from effvit.data.sources.tree import Tree
from effvit.errors import UserError

_ANNOTATIONS = "val/val_annotations.txt"


def tiny_imagenet(tree: Tree, choices: Choices) -> Layout | None:
    """Recognise it by ``val/val_annotations.txt``. ``val`` is the test split; ``test``, without labels, is not read."""
    if not tree.has(_ANNOTATIONS) or "train" not in tree.folders():
        return None
    classes = class_names(tree, ["train"])
    labels = _annotations(tree)
    if strangers := sorted(set(labels.values()) - set(classes)):
        raise UserError(f"{tree.root / _ANNOTATIONS}: has the class {strangers[0]!r}, which train/ does not have")
    unread = ", test/ not read (no labels)" if "test" in tree.folders() else ""

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        return {TRAIN: list_split(tree, ["train"], wanted), TEST: _read_val(tree, labels, wanted)}

    description = f"Tiny-ImageNet as downloaded, train/<wnid>/images, val/images with val_annotations.txt{unread}"
    return Layout(description, tuple(classes), read, read_titles(tree, "words.txt"))


def _annotations(tree: Tree) -> dict[str, str]:
    """The class of each file in ``val/images``."""
    labels = {}
    for number, line in enumerate(tree.read_text(_ANNOTATIONS).splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(f"{tree.root / _ANNOTATIONS}: line {number} is not a file, a tab and a class")
        labels[fields[0]] = fields[1]
    return labels


def _read_val(tree: Tree, labels: dict[str, str], wanted: tuple[str, ...]) -> Split:
    notes: Counter[str] = Counter()
    there = {path.rpartition("/")[2]: path for path in list_images(tree, "val/images", notes)}
    if missing := sorted(set(labels) ^ set(there)):
        where = "val/images" if missing[0] in labels else _ANNOTATIONS
        raise UserError(f"{tree.root / where}: {missing[0]} is missing, as are {len(missing) - 1} more")
    listing: Listing = {name: [] for name in wanted}
    for file in sorted(there):
        if labels[file] in listing:
            listing[labels[file]].append(there[file])
    return Split(labels_of(listing), tree.originals([path for files in listing.values() for path in files]), notes)
