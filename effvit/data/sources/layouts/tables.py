"""Hugging Face's data sets: Parquet shards as on the Hub, or Arrow files as ``save_to_disk`` and its cache write them.

Read with pyarrow alone. Names of classes are in the schema's metadata under ``huggingface``.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.joined import join_originals
from effvit.data.sources.layout import WHOLE, Choices, Layout, part_of
from effvit.data.sources.rows import Rows, is_parquet, one_line, open_arrow
from effvit.data.sources.tree import Directory, Kind, Tree, join
from effvit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

_SUFFIXES = (".parquet", ".pq", ".arrow")
_DEPTH = 2  # cifar10/plain_text/train/0000.parquet
_STATE = "state.json"  # of save_to_disk
_LABELS = ("label", "labels", "fine_label", "class", "category", "target", "cls")


@dataclass(frozen=True)
class _Columns:
    """The columns that hold image and label, and the names of classes, where the schema has them."""

    image: str
    label: str
    names: tuple[str, ...] | None


def tables(tree: Tree, choices: Choices) -> Layout | None:
    """Recognise Parquet or Arrow files, in splits by the names of files or folders."""
    if not isinstance(tree, Directory):
        return None
    files = _find(tree)
    if not files:
        return None
    kind = "Parquet" if is_parquet(Path(files[0])) else "Arrow"
    parts = _by_part(tree, files)
    columns = _choose_columns(tree.root / files[0], choices)
    values = {file: _labels(tree.root / file, columns) for file in files}
    classes, codes = _classes(columns, values, tree.root)
    unread = ""
    for part in list(parts):
        if all((codes[file] < 0).all() for file in parts[part]):
            count = sum(len(codes[file]) for file in parts.pop(part))
            unread += f", {part} not read ({count:,} rows without labels)"
    for file, code in codes.items():
        if any(file in of_part for of_part in parts.values()) and (code < 0).any():
            row = int(np.argmax(code < 0))
            raise UserError(f"{tree.root / file}[{row}]: no label in the column {columns.label!r}; remove the row")

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        new = np.full(len(classes), -1, dtype=np.int64)
        new[[classes.index(name) for name in wanted]] = np.arange(len(wanted))
        return {part: _split(tree, of_part, codes, new, columns.image) for part, of_part in parts.items()}

    shown = f"columns {columns.image} and {columns.label}"
    return Layout(f"{kind} files, {shown}{unread}", classes, read)


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
    try:
        names = [entry["filename"] for entry in json.loads(tree.read_text(path))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{tree.root / path}: not what save_to_disk writes; save the data set again") from error
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


def _schema(path: Path) -> "pa.Schema":
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path) if is_parquet(path) else open_arrow(path).schema
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: not a whole Parquet or Arrow file ({one_line(error)}); fetch it again") from error


def _choose_columns(path: Path, choices: Choices) -> _Columns:
    schema = _schema(path)
    features = _features(schema)
    for option, name in (("image_column", choices.image_column), ("label_column", choices.label_column)):
        if name is not None and name not in schema.names:
            raise UserError(
                f"{option}={name}: {path} has the columns {', '.join(schema.names)}{did_you_mean(name, schema.names)}"
            )
    images = [choices.image_column] if choices.image_column else _image_columns(schema, features)
    if len(images) != 1:
        found = f"several columns with images ({', '.join(images)})" if images else "no column with images"
        raise UserError(
            f"image_column=None: {path} has {found}; its columns are {', '.join(schema.names)}; "
            "image_column=NAME takes one"
        )
    if not _holds_images(schema.field(images[0]).type):
        raise UserError(
            f"image_column={images[0]}: in {path} it is {schema.field(images[0]).type}, expected encoded images; name "
            "another as image_column"
        )
    labels = [choices.label_column] if choices.label_column else _label_columns(schema, features, images[0])
    if len(labels) != 1:
        found = f"several columns that may be labels ({', '.join(labels)})" if labels else "no column of labels"
        raise UserError(
            f"label_column=None: {path} has {found}; its columns are {', '.join(schema.names)}; "
            "label_column=NAME takes one"
        )
    feature = features.get(labels[0], {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if not _may_be_label(schema.field(labels[0]).type):
        raise UserError(
            f"label_column={labels[0]}: in {path} it is {schema.field(labels[0]).type}, expected one class for each "
            "row, as number or text; name another as label_column"
        )
    return _Columns(images[0], labels[0], tuple(map(str, names)) if names else None)


def _features(schema: "pa.Schema") -> Mapping[str, Any]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_columns(schema: "pa.Schema", features: Mapping[str, Any]) -> list[str]:
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    found = declared or [field.name for field in schema if _holds_images(field.type)]
    usual = [name for name in found if name.lower() in ("image", "img")]
    return usual if len(usual) == 1 else found


def _holds_images(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_columns(schema: "pa.Schema", features: Mapping[str, Any], image: str) -> list[str]:
    others = [name for name in schema.names if name != image]
    found = [name for name in others if features.get(name, {}).get("_type") == "ClassLabel"]
    found = found or [name for name in others if _may_be_label(schema.field(name).type)]
    for usual in _LABELS:
        if usual in found:
            return [usual]
    return found


def _may_be_label(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _labels(path: Path, columns: _Columns) -> "pa.ChunkedArray":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=[columns.label]) if is_parquet(path) else open_arrow(path)
        kind = _schema(path).field(columns.image).type
        values = table.column(columns.label)
        values.validate(full=True)
    except KeyError as error:
        raise UserError(f"{path}: has no column {columns.image} or {columns.label}, as the other files have") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: damaged file ({one_line(error)}); fetch it again") from error
    if not _holds_images(kind) or not _may_be_label(values.type):
        raise UserError(f"{path}: columns {columns.image} and {columns.label} are not of the other files' types")
    return pa.chunked_array(values.chunks, values.type)


def _classes(
    columns: _Columns, values: "Mapping[str, pa.ChunkedArray]", root: Path
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """All classes, and for each file the index of each row's class, -1 where it has none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = all(pa.types.is_integer(column.type) for column in values.values())
    if columns.names and numbers:
        return columns.names, {file: _codes(column, columns, root / file) for file, column in values.items()}
    distinct = {value for column in values.values() for value in pc.unique(column).to_pylist()} - {None, -1, ""}
    ordered = sorted(distinct) if numbers else sorted(map(str, distinct))
    index = pa.array(ordered, pa.int64() if numbers else pa.string())
    codes = {}
    for file, column in values.items():
        cast = column.cast(index.type)
        found = pc.fill_null(pc.index_in(cast, index), -1)
        codes[file] = np.asarray(found, dtype=np.int64)
    return tuple(map(str, ordered)), codes


def _codes(column: "pa.ChunkedArray", columns: _Columns, path: Path) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    assert columns.names is not None
    codes = np.asarray(pc.fill_null(column.cast(pa.int64()), -1), dtype=np.int64)
    wrong = np.flatnonzero((codes < -1) | (codes >= len(columns.names)))
    if len(wrong):
        raise UserError(
            f"{path}[{wrong[0]}]: the label {codes[wrong[0]]} in {columns.label!r} is none of the "
            f"{len(columns.names)} classes, 0 to {len(columns.names) - 1}"
        )
    return codes


def _split(
    tree: Directory, files: Sequence[str], codes: Mapping[str, np.ndarray], new: np.ndarray, column: str
) -> Split:
    labels, lots = [], []
    for file in files:
        code = new[codes[file]]
        rows = np.flatnonzero(code >= 0)
        labels.append(code[rows])
        lots.append(Rows(tree.root, file, column, rows))
    return Split(np.concatenate(labels), join_originals(lots), Counter())
