"""Hugging Face's data sets: Parquet shards as on the Hub, or Arrow files as ``save_to_disk`` and its cache write them.

Read with pyarrow alone. Names of classes are in the schema's metadata under ``huggingface``.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.joined import join_originals
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.layouts.columns import (
    choose_columns,
    class_names,
    holds_images,
    image_columns,
    may_be_label,
    read_schema,
)
from effvit.data.sources.names import (
    TEST,
    VALIDATION,
    WHOLE,
    check_shards,
    class_order,
    classes_among,
    has_no_labels,
    part_of,
)
from effvit.data.sources.reading import reading
from effvit.data.sources.rows import Rows, is_parquet, open_arrow
from effvit.data.sources.tree import Directory, Kind, Tree, join
from effvit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_SUFFIXES = (".parquet", ".pq", ".arrow")
_DEPTH = 2  # cifar10/plain_text/train/0000.parquet
_STATE = "state.json"  # of save_to_disk


@dataclass(frozen=True)
class _Labels:
    """A file's column of labels, and what its numbers stand for, where the schema says so."""

    values: "pa.ChunkedArray"
    names: tuple[str, ...] | None

    @cached_property
    def distinct(self) -> set[Any]:
        """Every label once."""
        import pyarrow.compute as pc

        return set(pc.unique(self.values).to_pylist())


def tables(tree: Tree, choices: Choices) -> Layout | str | None:
    """Recognise Parquet or Arrow files, in splits by the names of files or folders.

    A test or validation part without any label is left out, and the description says so. Of files without images,
    return that.
    """
    if not isinstance(tree, Directory):
        return None
    files = _find(tree)
    if not files:
        return None
    schemas = {file: read_schema(tree.root / file) for file in files}
    with_images = [file for file in files if choices.image_column or image_columns(schemas[file])]
    if not with_images:
        columns = ", ".join(schemas[files[0]].names)
        return f"{files[0]} has no column with images; its columns are {columns}; image_column=NAME takes one"
    if tree.only is None:
        check_shards(files, tree.root)
    parts = _by_part(tree, files)
    # Of a test part that nobody may see the labels of, there may be no column of them.
    of_training = {file for part in parts if part not in (TEST, VALIDATION) for file in parts[part]}
    first = min(with_images, key=lambda file: file not in of_training)
    image, label = choose_columns(tree.root / first, schemas[first], choices)
    labels = {file: _read_labels(tree.root / file, image, label) for file in files}
    unread = ""
    for part in list(parts):
        if has_no_labels(part, set[Any]().union(*(labels[file].distinct for file in parts[part]))):
            count = sum(len(labels.pop(file).values) for file in parts.pop(part))
            unread += f", {part} not read ({count:,} rows without labels)"
    for file in labels:
        if label not in schemas[file].names:
            raise UserError(f"{tree.root / file}: has no column {label}, as other files have")
    classes, codes = _classes(labels, label, tree.root)

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        new = np.full(len(classes), -1, dtype=np.int64)
        new[[classes.index(name) for name in wanted]] = np.arange(len(wanted))
        return {part: _split(tree, of_part, codes, new, image) for part, of_part in parts.items()}

    kind = "Parquet" if is_parquet(Path(files[0])) else "Arrow"
    described = f"{kind} files, columns {image} and {label}{unread}"
    return Layout(described, classes, read, takes=("image_column", "label_column"))


def _find(tree: Directory) -> list[str]:
    """Paths of the tables, in the order of their rows."""
    found: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop(0)
        entries = tree.entries(folder)
        names = [entry.name for entry in entries if entry.kind is Kind.FILE]
        if _STATE in names:
            names = _data_files(tree, folder)
        found += [join(folder, name) for name in names if name.lower().endswith(_SUFFIXES) and name[:6] != "cache-"]
        # Folders within a part are classes, and not looked into: there may be millions of files.
        if folder.count("/") < _DEPTH and not part_of(folder.rpartition("/")[2]):
            folders += [join(folder, entry.name) for entry in entries if entry.kind is Kind.FOLDER]
    kinds = {is_parquet(Path(path)) for path in found}
    if len(kinds) > 1:
        raise UserError(
            f"root={tree.root}: holds Parquet and Arrow files; expected one or the other, or name a folder in it"
        )
    return found


def _data_files(tree: Directory, folder: str) -> list[str]:
    path = join(folder, _STATE)
    with reading(tree.root / path, "not what save_to_disk writes"):
        names = [entry["filename"] for entry in json.loads(tree.read_text(path))["_data_files"]]
    for name in names:
        if not isinstance(name, str) or "/" in name or not tree.has(join(folder, name)):
            raise UserError(f"{tree.root / path}: names {name!r}, which is not there; save the data set again")
    return names


def _by_part(tree: Directory, files: Sequence[str]) -> dict[str, list[str]]:
    """Files of each part; all are of one data set, that is, in one folder or in one folder for each part."""
    parts: dict[str, list[str]] = defaultdict(list)
    places = set()
    for file in files:
        folders, name = list(PurePosixPath(file).parent.parts), PurePosixPath(file).name
        part = part_of(name)
        while part is None and folders:
            part = part_of(folders.pop())
        parts[part or WHOLE].append(file)
        places.add(join(*(folders if part else PurePosixPath(file).parent.parts)))
    if len(places) > 1:
        several = ", ".join(sorted(place or "." for place in places))
        raise UserError(f"root={tree.root}: holds several data sets, in {several}; name one as root")
    if WHOLE in parts and len(parts) > 1:
        raise UserError(
            f"{tree.root}: {parts[WHOLE][0]} does not say which split it is; expected train, validation or test in "
            "the name of each file or folder"
        )
    return dict(parts)


def _read_labels(path: Path, image: str, label: str) -> _Labels:
    """The labels of a file as int64 or text, none where it has no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = read_schema(path)
    if image not in schema.names:
        raise UserError(f"{path}: has no column {image}, as the other files have")
    if label not in schema.names:
        with reading(path):
            rows = pq.read_metadata(path).num_rows if is_parquet(path) else open_arrow(path).num_rows
        return _Labels(pa.chunked_array([pa.nulls(rows)]), None)
    if not holds_images(schema.field(image).type) or not may_be_label(schema.field(label).type):
        raise UserError(f"{path}: columns {image} and {label} are not of the other files' types")
    with reading(path):
        table = pq.read_table(path, columns=[label]) if is_parquet(path) else open_arrow(path)
        values = table.column(label)
        values.validate(full=True)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
    try:
        values = values.cast(pa.int64() if pa.types.is_integer(values.type) else pa.string())
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: the column {label!r} has numbers above {2**63 - 1}; write labels as text") from error
    return _Labels(values, class_names(schema, label) if pa.types.is_integer(values.type) else None)


def _classes(labels: Mapping[str, _Labels], column: str, root: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """All classes, and for each file the index of each row's class.

    Files may name the same numbers differently: what counts is the name.
    """
    without = [file for file, of_file in labels.items() if of_file.names is None]
    if without and len(without) < len(labels):
        other = next(file for file in labels if file not in without)
        raise UserError(
            f"{root / without[0]}: has no names of its classes in the schema, as {other} has; save it again"
        )
    if without:
        found = classes_among(set().union(*(of_file.distinct for of_file in labels.values())))
        classes = tuple(sorted(map(str, found), key=class_order))
    else:
        classes = tuple(dict.fromkeys(name for of_file in labels.values() for name in of_file.names or ()))
    codes = {file: _codes(of_file, classes, column, root / file) for file, of_file in labels.items()}
    return classes, codes


def _codes(labels: _Labels, classes: Sequence[str], column: str, path: Path) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if labels.names is None:
        codes = np.asarray(
            pc.fill_null(pc.index_in(labels.values.cast(pa.string()), pa.array(classes, pa.string())), -1)
        )
    else:
        numbers = np.asarray(pc.fill_null(labels.values, -1))
        wrong = np.flatnonzero((numbers < -1) | (numbers >= len(labels.names)))
        if len(wrong):
            raise UserError(
                f"{path}[{wrong[0]}]: the label {numbers[wrong[0]]} in {column!r} is none of the "
                f"{len(labels.names)} classes, 0 to {len(labels.names) - 1}"
            )
        index = {name: number for number, name in enumerate(classes)}
        codes = np.array([*map(index.__getitem__, labels.names), -1])[numbers]
    if (codes < 0).any():
        raise UserError(f"{path}[{int(np.argmax(codes < 0))}]: no label in the column {column!r}; remove the row")
    return codes.astype(np.int64)


def _split(
    tree: Directory, files: Sequence[str], codes: Mapping[str, np.ndarray], new: np.ndarray, column: str
) -> Split:
    labels, lots = [], []
    for file in files:
        code = new[codes[file]]
        rows = np.flatnonzero(code >= 0)
        labels.append(code[rows])
        lots.append(Rows(tree.top, tree.from_top(file), column, rows))
    return Split(np.concatenate(labels), join_originals(lots), Counter())
