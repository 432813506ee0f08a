"""ImageNet-1k as it is given out: a flat ``val`` with its ground truth apart, and training images in a tar per class.

Kaggle's release has ``ILSVRC/Data/CLS-LOC/train/<wnid>``, ``val`` and ``LOC_val_solution.csv``. The official one has
``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and the devkit, whose ground truth is a number per image.
"""

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from effvit.data.sources.base import Originals, Split
from effvit.data.sources.joined import join_originals
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.layouts.class_folders import list_images, list_split
from effvit.data.sources.layouts.titles import read_titles
from effvit.data.sources.members import TarMembers, list_tar
from effvit.data.sources.names import TEST, TRAIN
from effvit.data.sources.packed import open_tar
from effvit.data.sources.reading import reading
from effvit.data.sources.tree import Directory, Tree, is_litter_path, join
from effvit.errors import UserError

_PLACES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_VAL_NAME = "ILSVRC2012_val_"
_UP = 3  # folders from CLS-LOC to where Kaggle's archive was unpacked
_LARGEST_TRUTH = 2**26
_READ_META = """
import io, json, sys
from scipy.io import loadmat
synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
print(json.dumps([(int(number), str(wnid)) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])]))
"""


def imagenet(tree: Tree, choices: Choices) -> Layout | None:
    """Recognise ImageNet with a flat ``val`` or with training images in tars; ``val`` is the test split.

    Raises:
        UserError: the ground truth of ``val`` is not there, or does not fit the images.
    """
    for place in _PLACES:
        inner = tree.within(place) if place else tree
        train = _train_part(inner)
        val = _val_part(inner) if train else None
        if train and val:
            break
    else:
        return None
    near = [inner, *([] if inner is tree else [tree]), *_above(inner)]
    truth = _find_truth(near)
    if truth is None:
        raise UserError(
            f"{inner.root}: val has {len(val.names):,} images without folders of classes; put {_SOLUTION} (Kaggle) or "
            f"{_DEVKIT} (the official devkit) next to it"
        )
    labels, said = truth
    titles = next((found for each in near if (found := read_titles(each, _MAPPING))), {})
    classes = tuple(sorted({*train.classes, *(labels[stem] for stem in val.stems(labels))}))

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        if strangers := sorted(set(wanted) - set(train.classes)):
            more = f", nor {len(strangers) - 1} more classes" if len(strangers) > 1 else ""
            raise UserError(
                f"{inner.root}: train has no class {strangers[0]!r} of val{more}; classes=FILE takes only those in "
                "a file"
            )
        return {TRAIN: train.read(wanted), TEST: val.read(labels, wanted, inner.root)}

    return Layout(f"ImageNet, {train.described}, {val.described} with {said}", classes, read, titles)


@dataclass(frozen=True)
class _ClassFolders:
    tree: Tree
    classes: tuple[str, ...]
    described: str = "train/<wnid>"

    def read(self, wanted: tuple[str, ...]) -> Split:
        return list_split(self.tree, ["train"], wanted)


@dataclass(frozen=True)
class _ClassTars:
    """Tars of one class each: ``tars`` has the file, the first byte and the bytes of each."""

    tree: Directory
    tars: Mapping[str, tuple[str, int, int | None]]
    described: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(self.tars))

    def read(self, wanted: tuple[str, ...]) -> Split:
        lots, counts = [], []
        for name in wanted:
            file, start, size = self.tars[name]
            members = sorted(list_tar(self.tree.root / file, start, size))
            members = [each for each in members if not each.name.endswith("/") and not is_litter_path(each.name)]
            places = np.array([(0, *member.place) for member in members], dtype=np.int64).reshape(-1, 3)
            lots.append(
                TarMembers(self.tree.top, (self.tree.from_top(file),), tuple(member.name for member in members), places)
            )
            counts.append(len(members))
        return Split(np.repeat(np.arange(len(wanted), dtype=np.int64), counts), join_originals(lots))


@dataclass(frozen=True)
class _Flat:
    """Images of ``val`` in one folder: their names, and how to get at some of them."""

    names: tuple[str, ...]
    originals: Callable[[Sequence[str]], Originals]
    described: str
    notes: Counter[str]

    def stems(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The images by what the ground truth calls them."""
        found = {name.rpartition("/")[2].partition(".")[0]: name for name in sorted(self.names)}
        if unknown := next((name for stem, name in found.items() if stem not in labels), None):
            raise UserError(f"{unknown}: no ground truth for this image of val")
        return found

    def read(self, labels: Mapping[str, str], wanted: Sequence[str], root: Path) -> Split:
        found = self.stems(labels)
        listing: dict[str, list[str]] = {name: [] for name in wanted}
        stems = sorted(stem for stem, label in labels.items() if label in listing)
        if missing := [stem for stem in stems if stem not in found]:
            raise UserError(
                f"{root}: of the {len(stems):,} images of val in the ground truth {len(missing):,} are missing, the "
                f"first is {missing[0]}; fetch them"
            )
        for stem in stems:
            listing[labels[stem]].append(found[stem])
        numbers = np.repeat(np.arange(len(wanted), dtype=np.int64), [len(files) for files in listing.values()])
        return Split(numbers, self.originals([name for files in listing.values() for name in files]), self.notes)


def _train_part(tree: Tree) -> _ClassFolders | _ClassTars | None:
    if folders := tree.folders("train"):
        return _ClassFolders(tree, tuple(sorted(folders)))
    if not isinstance(tree, Directory):
        return None
    if tars := [name for name in tree.files("train") if _CLASS_TAR.fullmatch(name)]:
        found = {name.removesuffix(".tar"): (join("train", name), 0, None) for name in tars}
        return _ClassTars(tree, found, "train/<wnid>.tar")
    if tree.has(_TRAIN_TAR):
        inner = {
            member.name.removesuffix(".tar"): (_TRAIN_TAR, *member.place)
            for member in list_tar(tree.root / _TRAIN_TAR)
            if _CLASS_TAR.fullmatch(member.name)
        }
        return _ClassTars(tree, inner, _TRAIN_TAR) if inner else None  # type: ignore[arg-type]
    return None


def _val_part(tree: Tree) -> _Flat | None:
    notes: Counter[str] = Counter()
    if any(name.startswith(_VAL_NAME) for name in tree.files("val")) and not tree.folders("val"):
        names = tuple(list_images(tree, "val", notes))
        return _Flat(names, tree.originals, "val/*", notes)
    if isinstance(tree, Directory) and tree.has(_VAL_TAR):
        packed, file = open_tar(tree.root / _VAL_TAR), tree.from_top(_VAL_TAR)

        def originals(names: Sequence[str]) -> Originals:
            return replace(packed.originals(names), root=tree.top, archives=(file,))  # type: ignore[type-var]

        return _Flat(tuple(list_images(packed, "", notes)), originals, _VAL_TAR, notes)
    return None


def _above(tree: Tree) -> list[Tree]:
    """The folders around a directory, as many as Kaggle's release has."""
    return (
        [Directory(parent) for parent in list(tree.root.resolve().parents)[:_UP]] if isinstance(tree, Directory) else []
    )


def _find_truth(trees: Sequence[Tree]) -> tuple[dict[str, str], str] | None:
    """The class of each image of ``val`` by the stem of its name, and where that is from."""
    for tree in trees:
        if tree.has(_SOLUTION):
            return _read_solution(tree), _SOLUTION
        if tree.has(join(_DEVKIT, _TRUTH)) and tree.has(join(_DEVKIT, _META)):
            files = [tree.open(join(_DEVKIT, name)).read() for name in (_TRUTH, _META)]
            return _read_devkit(tree, *files), _DEVKIT
        if isinstance(tree, Directory) and tree.has(f"{_DEVKIT}.tar.gz"):
            return _read_devkit(tree, *_unpack_devkit(tree)), f"{_DEVKIT}.tar.gz"
    return None


def _read_solution(tree: Tree) -> dict[str, str]:
    rows = list(csv.reader(io.StringIO(tree.read_text(_SOLUTION))))
    if not rows or rows[0][:2] != ["ImageId", "PredictionString"]:
        raise UserError(f"{tree.root / _SOLUTION}: expected the columns ImageId and PredictionString")
    labels = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) < 2 or not row[1].split():
            raise UserError(f"{tree.root / _SOLUTION}: line {number} has no class")
        labels[row[0].partition(".")[0]] = row[1].split()[0]
    return labels


def _unpack_devkit(tree: Directory) -> list[bytes]:
    path, found = tree.root / f"{_DEVKIT}.tar.gz", {}
    with reading(path, "damaged or not the devkit"), tarfile.open(path, "r:gz") as tar:
        for name in (_TRUTH, _META):
            member = tar.getmember(join(_DEVKIT, name))
            file = tar.extractfile(member) if member.isfile() and member.size < _LARGEST_TRUTH else None
            if file is None:
                raise tarfile.TarError(f"{name} is no file of the expected size")
            found[name] = file.read()
    return [found[_TRUTH], found[_META]]


def _read_devkit(tree: Tree, truth: bytes, meta: bytes) -> dict[str, str]:
    # In a process of its own: SciPy's reader crashes on some damaged files.
    read = subprocess.run([sys.executable, "-c", _READ_META], input=meta, capture_output=True, check=False)
    with reading(tree.root / _DEVKIT, "damaged or not the devkit"):
        if read.returncode:
            raise ValueError("meta.mat is damaged")
        wnids = dict(json.loads(read.stdout))
        numbers = [int(line) for line in truth.split()]
        return {f"{_VAL_NAME}{index:08}": wnids[number] for index, number in enumerate(numbers, start=1)}
