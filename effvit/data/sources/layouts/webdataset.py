"""WebDataset: tar shards in which the files of a sample share a key, as ``0001.jpg`` and ``0001.cls`` or ``0001.json``.

https://github.com/webdataset/webdataset: the key is the name up to the first dot after the last slash.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.images import SUFFIXES
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.members import TarMembers, list_tar
from effvit.data.sources.names import WHOLE, check_shards, class_order, classes_among, has_no_labels, number_in, part_of
from effvit.data.sources.reading import reading
from effvit.data.sources.tree import Directory, Tree, is_litter_path, join
from effvit.errors import UserError, did_you_mean

_LABEL_SUFFIXES = (".cls", ".json")
_KEYS = ("label", "cls", "class", "class_id", "class_name", "category", "target")
_PEEK = 64  # members that say what kind of archive a tar is
_LARGEST_LABEL = 2**20


@dataclass
class _Samples:
    """Images of a part: names, places as `TarMembers` has them, labels (None where there is none), stray files."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def webdataset(tree: Tree, choices: Choices) -> Layout | None:
    """Recognise tar shards with images and their labels, at the root or in a folder for each part.

    Samples are in the order of shards and of their keys in each. A label is a number or a name. A test or validation
    part without any label is left out, and the description says so.
    """
    if not isinstance(tree, Directory):
        return None
    shards = [name for name in tree.files() if name.lower().endswith(".tar")]
    for folder in tree.folders():
        if part_of(folder):
            shards += [join(folder, name) for name in tree.files(folder) if name.lower().endswith(".tar")]
    parts: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        path = PurePosixPath(shard)
        parts[part_of(path.name) or part_of(str(path.parent)) or WHOLE].append(shard)
    if not any(is_shard(tree.root / names[0]) for names in parts.values()):
        return None
    if WHOLE in parts and len(parts) > 1:
        raise UserError(
            f"{tree.root}: {parts[WHOLE][0]} does not say which split it is; expected train, val or test in its name"
        )
    if tree.only is None:
        check_shards(shards, tree.root)
    read = {part: _read(tree, names, choices.label_column) for part, names in parts.items()}
    unread = ""
    for part in [part for part, samples in read.items() if has_no_labels(part, samples.labels)]:
        unread += f", {part} not read ({len(read.pop(part).labels):,} images without labels)"
    found = classes_among(label for samples in read.values() for label in samples.labels)
    for part, samples in read.items():
        if without := [index for index, label in enumerate(samples.labels) if label not in found]:
            where = tree.root / parts[part][samples.places[without[0]][0]] / samples.names[without[0]]
            raise UserError(f"{where}: {len(without):,} images of {part} have no label, as .cls, or .json with one")
    if len({type(value) for value in found}) > 1:
        raise UserError(
            f"{tree.root / (tree.only or '')}: some labels are numbers and some are names; expected one or the other"
        )
    classes = tuple(sorted(map(str, found), key=class_order))

    def take(wanted: tuple[str, ...]) -> dict[str, Split]:
        return {part: _split(tree, parts[part], samples, wanted) for part, samples in read.items()}

    return Layout(f"WebDataset, {len(shards)} tar shards{unread}", classes, take, takes=("label_column",))


def is_shard(path: Path) -> bool:
    """Whether among the first files of a tar are an image and a label with the same key."""
    keys = defaultdict(set)
    for member in islice(list_tar(path), _PEEK):
        key, suffix = _split_name(member.name)
        if not is_litter_path(member.name):
            keys[suffix].add(key)
    images = set().union(*(keys[suffix] for suffix in SUFFIXES))
    return any(images & keys[suffix] for suffix in _LABEL_SUFFIXES)


def _split_name(name: str) -> tuple[str, str]:
    """The key of a member's name, and the suffix after its last dot."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return f"{folder}{slash}{key}", f".{rest.rpartition('.')[2]}".lower() if dot else ""


def _read(tree: Directory, shards: Sequence[str], column: str | None) -> _Samples:
    samples = _Samples()
    for number, shard in enumerate(shards):
        _add(samples, tree.root / shard, number, column)
    return samples


def _add(samples: _Samples, path: Path, number: int, column: str | None) -> None:
    """Add those of one shard, in the order of their keys."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int | str] = {}
    with path.open("rb") as file:
        for member in list_tar(path):
            key, suffix = _split_name(member.name)
            if is_litter_path(member.name):
                samples.notes["stray files ignored"] += 1
            elif suffix in SUFFIXES:
                if key in images:
                    raise UserError(f"{path}: sample {key!r} has two images; expected one")
                images[key] = (member.name, *member.place)  # type: ignore[assignment]
            elif suffix in _LABEL_SUFFIXES and not (suffix == ".json" and key in labels):
                offset, size = member.place
                if size > _LARGEST_LABEL:
                    raise UserError(f"{path}/{member.name}: {size:,} bytes are no label")
                file.seek(offset)
                value = _label(file.read(size), suffix, column, path / member.name)
                if value is not None:
                    labels[key] = value
    if missing := [key for key in labels if key not in images]:
        raise UserError(f"{path}: {len(missing)} samples have no image, the first is {missing[0]!r}")
    for key in sorted(images):
        name, offset, size = images[key]
        samples.names.append(name)
        samples.places.append((number, offset, size))
        samples.labels.append(labels.get(key))


def _label(content: bytes, suffix: str, column: str | None, path: Path) -> int | str | None:
    with reading(path, "expected a label, as number or name"):
        text = content.decode("utf-8").strip()
        if suffix == ".cls":
            if not text:
                raise ValueError("it is empty")
            number = number_in(text)
            return text if number is None else number
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("no object")
    if column is not None and column not in fields:
        raise UserError(f"label_column={column}: {path} has {', '.join(fields)}{did_you_mean(column, fields)}")
    value = fields[column] if column else next((fields[key] for key in _KEYS if key in fields), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise UserError(f"{path}: the label is {json.dumps(value)[:80]}, expected one class, as number or name")
    return value


def _split(tree: Directory, shards: Sequence[str], samples: _Samples, wanted: Sequence[str]) -> Split:
    index = {name: number for number, name in enumerate(wanted)}
    labels = np.array([index.get(str(value), -1) for value in samples.labels], dtype=np.int64)
    places = np.array(samples.places, dtype=np.int64).reshape(-1, 3)
    images = TarMembers(tree.top, tuple(map(tree.from_top, shards)), tuple(samples.names), places)
    rows = np.flatnonzero(labels >= 0)
    return Split(labels[rows], images.take(rows), samples.notes)
