"""WebDataset: tar shards in which the files of a sample share a key, as ``0001.jpg`` and ``0001.cls`` or ``0001.json``.

https://github.com/webdataset/webdataset: the key is the name up to the first dot after the last slash.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.images import SUFFIXES
from effvit.data.sources.layout import WHOLE, Choices, Layout, part_of
from effvit.data.sources.members import TarMembers, list_tar
from effvit.data.sources.tree import Directory, Tree, join
from effvit.errors import UserError, did_you_mean

_LABEL_SUFFIXES = (".cls", ".json")
_KEYS = ("label", "cls", "class", "class_id", "class_name", "category", "target")
_PEEK = 64  # members that say what kind of archive a tar is
_LARGEST_LABEL = 2**20


def webdataset(tree: Tree, choices: Choices) -> Layout | None:
    """Recognise tar shards with images and their labels, at the root or in a folder for each part.

    Samples are in the order of shards and of their keys in each. A label is a number or a name.
    """
    if not isinstance(tree, Directory):
        return None
    shards = [name for name in tree.files() if name.lower().endswith(".tar")]
    for folder in tree.folders():
        if part_of(folder):
            shards += [join(folder, name) for name in tree.files(folder) if name.lower().endswith(".tar")]
    if not shards or not _is_shard(tree.root / shards[0]):
        return None
    parts: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        path = PurePosixPath(shard)
        parts[part_of(path.name) or part_of(str(path.parent)) or WHOLE].append(shard)
    if WHOLE in parts and len(parts) > 1:
        raise UserError(
            f"{tree.root}: {parts[WHOLE][0]} does not say which split it is; expected train, val or test in its name"
        )
    read = {part: _read(tree.root, names, choices.label_column) for part, names in parts.items()}
    found = {value for _, values in read.values() for value in values}
    numbers = all(isinstance(value, int) for value in found)
    if not numbers and any(isinstance(value, int) for value in found):
        raise UserError(f"{tree.root}: some labels are numbers and some are names; expected one or the other")
    classes = tuple(map(str, sorted(found)))

    def take(wanted: tuple[str, ...]) -> dict[str, Split]:
        return {part: _split(images, values, wanted) for part, (images, values) in read.items()}

    return Layout(f"WebDataset, {len(shards)} tar shards", classes, take)


def _is_shard(path: Path) -> bool:
    suffixes = set()
    for number, member in enumerate(list_tar(path)):
        suffixes.add(_split_name(member.name)[1])
        if number == _PEEK:
            break
    return bool(suffixes & set(_LABEL_SUFFIXES)) and bool(suffixes & set(SUFFIXES))


def _split_name(name: str) -> tuple[str, str]:
    """The key of a member's name, and the suffix after its last dot."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return f"{folder}{slash}{key}", f".{rest.rpartition('.')[2]}".lower() if dot else ""


def _read(root: Path, shards: Sequence[str], column: str | None) -> tuple[TarMembers, list[int | str]]:
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    values: list[int | str] = []
    for number, shard in enumerate(shards):
        samples = _samples(root / shard, column)
        for key in sorted(samples):
            name, offset, size, value = samples[key]
            names.append(name)
            places.append((number, offset, size))
            values.append(value)
    members = TarMembers(root, tuple(shards), tuple(names), np.array(places, dtype=np.int64).reshape(-1, 3))
    return members, values


def _samples(path: Path, column: str | None) -> dict[str, tuple[str, int, int, int | str]]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int | str] = {}
    with path.open("rb") as file:
        for member in list_tar(path):
            key, suffix = _split_name(member.name)
            if suffix in SUFFIXES:
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
    for one, other, what in ((images, labels, "label (.cls, or .json with one)"), (labels, images, "image")):
        if missing := [key for key in one if key not in other]:
            raise UserError(f"{path}: {len(missing)} samples have no {what}, the first is {missing[0]!r}")
    return {key: (*images[key], labels[key]) for key in images}


def _label(content: bytes, suffix: str, column: str | None, path: Path) -> int | str | None:
    try:
        text = content.decode("utf-8").strip()
        if suffix == ".cls":
            return int(text) if text.lstrip("-").isdigit() else _name(text)
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("no object")
    except ValueError as error:  # undecodable text too
        raise UserError(f"{path}: expected a label, as number or name ({error})") from error
    if column is not None and column not in fields:
        raise UserError(f"label_column={column}: {path} has {', '.join(fields)}{did_you_mean(column, fields)}")
    value = fields[column] if column else next((fields[key] for key in _KEYS if key in fields), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise UserError(f"{path}: the label is {json.dumps(value)[:80]}, expected one class, as number or name")
    return value


def _name(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


def _split(images: TarMembers, values: Sequence[int | str], wanted: Sequence[str]) -> Split:
    index: Mapping[str, int] = {name: number for number, name in enumerate(wanted)}
    labels = np.array([index.get(str(value), -1) for value in values], dtype=np.int64)
    rows = np.flatnonzero(labels >= 0)
    return Split(labels[rows], images.take(rows))
