"""Images and a CSV that names each one's class, as in many competitions: ``train/1.png``, ``trainLabels.csv``."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.layouts.class_folders import has_class_folders
from effvit.data.sources.layouts.csv_images import TABLES, Images, choose_column, find_images
from effvit.data.sources.names import TRAIN, WHOLE, class_order, classes_among, find_column, has_no_labels, part_of
from effvit.data.sources.tree import Tree, join
from effvit.errors import UserError, did_you_mean

_IMAGE_COLUMNS = (
    *("image", "image_id", "imageid", "id", "file_name", "filename", "file", "path", "filepath", "image_path"),
    *("img", "image_name", "name"),
)
_LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "classname", "category", "target", "breed", "species", "level"),
    *("class_id", "classid", "label_name"),
)
_SPLIT_COLUMNS = ("split", "set", "subset", "data_set", "dataset", "partition")
_SAMPLE = "submission"  # of a competition: its labels are made up


class _Row(NamedTuple):
    """An image's path, its label, which may be empty, and where that is said."""

    path: str
    label: str
    where: str


@dataclass(frozen=True)
class _Table:
    """A CSV: its file and header, fields and line numbers of its rows, the indices of columns that matter.

    ``images`` are columns that may name images; ``split`` says the part of each row, where there is such a column.
    """

    file: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    images: list[int]
    label: int
    split: int | None

    @property
    def part(self) -> str | None:
        """The part that the name of the file or of its folder says."""
        return part_of(self.file.rpartition("/")[2]) or part_of(self.file)

    def column(self, index: int) -> list[str]:
        return [row[index].strip() for row in self.rows]


def csv_table(tree: Tree, choices: Choices) -> Layout | str | None:
    """Recognise CSVs next to images or in their folders; a part in a CSV's name or in a column ``split`` counts.

    Columns are known by their usual names, or by ``image_column`` and ``label_column``. A name of an image may have no
    suffix. CSVs of sample submissions are not read, nor are those without a column of labels. Next to CSVs of train and
    another part, one of no part is left out, as is a part without any label; the description says so.
    """
    files = [name for name in _tables(tree) if _SAMPLE not in name.lower()]
    images = find_images(tree) if files else Images({})
    if not images.paths:
        return None
    read_files = {file: _read(tree, file, choices) for file in files}
    found = [table for table in read_files.values() if table is not None]
    if not found:
        header = ", ".join(_lines(tree, files[0])[0][1])
        why = (
            f"{files[0]} has the columns {header}; name those of images and classes as image_column=NAME and "
            "label_column=NAME"
        )
        if choices.image_column or choices.label_column:
            raise UserError(f"{tree.root}: {why}")
        return None if has_class_folders(tree) else why
    tables = _of_parts(found)
    listing, used = _listing(tree, tables, images)
    said = ", ".join(f"{table.file} (columns {column} and {table.header[table.label]})" for table, column in used)
    said += "".join(f", {table.file} not read (of no part)" for table in found if table not in tables)
    without = [file for file, table in read_files.items() if table is None and part_of(file)]
    said += "".join(f", {file} not read (no columns of images and labels)" for file in without)
    labelled = {row.path for rows in listing.values() for row in rows}
    for part in [part for part, rows in listing.items() if has_no_labels(part, {row.label for row in rows})]:
        said += f", {part} not read ({len(listing.pop(part)):,} rows without labels)"
    rows = [row for rows in listing.values() for row in rows]
    classes = classes_among(row.label for row in rows)
    if row := next((row for row in rows if row.label not in classes), None):
        raise UserError(f"{row.where} has no class")
    unnamed = sum(path not in labelled for path in images.paths)

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        index = {name: number for number, name in enumerate(wanted)}
        splits = {}
        for number, (part, of_part) in enumerate(listing.items()):
            chosen = sorted((index[row.label], row.path) for row in of_part if row.label in index)
            notes = Counter({"images that no CSV names, not read": unnamed} if unnamed and not number else {})
            labels = np.array([label for label, _ in chosen], dtype=np.int64)
            splits[part] = Split(labels, tree.originals([path for _, path in chosen]), notes)
        return splits

    return Layout(
        f"images and {said}",
        tuple(sorted(map(str, classes), key=class_order)),
        read,
        takes=("image_column", "label_column"),
    )


def _tables(tree: Tree) -> list[str]:
    """CSVs at the top and in its folders."""
    paths = tree.files() + [join(folder, name) for folder in tree.folders() for name in tree.files(folder)]
    return [path for path in paths if path.lower().endswith(TABLES)]


def _lines(tree: Tree, file: str) -> list[tuple[int, list[str]]]:
    """Rows with the number of their last line, the header first."""
    text = tree.read_text(file)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{tree.root / file}: not a CSV ({error})") from error
    return lines or [(1, [])]


def _read(tree: Tree, file: str, choices: Choices) -> _Table | None:
    (_, header), *numbered = _lines(tree, file)
    lines, rows = [number for number, _ in numbered], [row for _, row in numbered]
    columns = []
    for option, name, usual in (
        ("image_column", choices.image_column, _IMAGE_COLUMNS),
        ("label_column", choices.label_column, _LABEL_COLUMNS),
    ):
        if name is not None and find_column(name, header) is None and part_of(file) in (None, TRAIN):
            raise UserError(
                f"{option}={name}: {tree.root / file} has the columns {', '.join(header)}{did_you_mean(name, header)}"
            )
        columns.append(_find([name] if name else usual, header))
    images, labels = columns
    images = [index for index in images if index not in labels[:1]]
    if not images or not labels:
        return None
    if not rows:
        raise UserError(f"{tree.root / file}: has no rows")
    for number, row in numbered:
        if len(row) != len(header):
            raise UserError(f"{tree.root / file}: line {number} has {len(row)} fields for {len(header)} columns")
    splits = [index for index in _find(_SPLIT_COLUMNS, header) if any(part_of(row[index]) for row in rows)]
    return _Table(file, header, rows, lines, images, labels[0], splits[0] if splits else None)


def _find(names: Iterable[str], header: Sequence[str]) -> list[int]:
    """The indices of the columns of these names, in any case."""
    return [index for name in names if (index := find_column(name, header)) is not None]


def _of_parts(tables: Sequence[_Table]) -> list[_Table]:
    """All tables, or those that say a part where there are some of train and of another."""
    said = {table.part for table in tables} - {None}
    if TRAIN not in said or len(said) < 2:
        return list(tables)
    return [table for table in tables if table.part or table.split is not None]


def _listing(
    tree: Tree, tables: Sequence[_Table], images: Images
) -> tuple[dict[str, list[_Row]], list[tuple[_Table, str]]]:
    """The rows of each part, and each table with its column of images."""
    listing: dict[str, list[_Row]] = {}
    used, of_parts = [], []
    for table in tables:
        column, found = _rows(tree, table, images)
        used.append((table, column))
        of_parts.append(found)
    several = Counter(part for found in of_parts for part in found)
    if max(several.values()) > 1 or {TRAIN, WHOLE} <= set(several):
        names = " and ".join(table.file for table in tables)
        raise UserError(f"{tree.root}: {names} are there, expected one CSV for each part")
    for found in of_parts:
        listing |= found
    if WHOLE in listing and len(listing) > 1:
        listing = {TRAIN if part == WHOLE else part: rows for part, rows in listing.items()}
    seen: dict[str, str] = {}
    for part, rows in listing.items():
        for row in rows:
            if seen.setdefault(row.path, part) != part:
                raise UserError(f"{row.where} is in {part}, and {row.path} is in {seen[row.path]} too; remove one row")
    return listing, used


def _rows(tree: Tree, table: _Table, images: Images) -> tuple[str, dict[str, list[_Row]]]:
    """The column of images, and the rows of each part."""
    path = tree.root / table.file
    column, paths = _paths(tree, table, images)
    if twice := [name for name, count in Counter(paths).items() if count > 1]:
        labels = {row[table.label] for name, row in zip(paths, table.rows, strict=True) if name == twice[0]}
        what = "classes, as with multi-label images" if len(labels) > 1 else "rows"
        raise UserError(f"{path}: {twice[0]} has several {what}; expected one row for each image")
    listing: dict[str, list[_Row]] = {}
    for name, row, line in zip(paths, table.rows, table.lines, strict=True):
        part: str | None = table.part or WHOLE
        if table.split is not None:
            part = part_of(row[table.split].strip())
            if part is None:
                raise UserError(
                    f"{path}: {row[table.split]!r} in the column {table.header[table.split]!r}: "
                    "expected train, validation or test"
                )
        where = f"{path}: line {line}"
        listing.setdefault(str(part), []).append(_Row(name, row[table.label].strip(), where))
    return column, listing


def _paths(tree: Tree, table: _Table, images: Images) -> tuple[str, list[str]]:
    """The column of images, and the image that each row names."""
    near, part = table.file.rpartition("/")[0], table.part or WHOLE
    columns = {table.header[index]: table.column(index) for index in table.images}
    try:
        column, found = choose_column(columns, images, near, part)
    except UserError as error:
        raise UserError(f"{tree.root / table.file}: {error}") from error
    names = columns[column]
    for name, line, paths in zip(names, table.lines, found, strict=True):
        where = f"{tree.root / table.file}: line {line} names {name!r} in the column {column!r}"
        if not paths:
            count = sum(not each for each in found)
            raise UserError(f"{where}, and {images.why_missing(name)} ({count:,} of {len(names):,} rows)")
        if len(paths) > 1:
            raise UserError(f"{where}, which may be {' or '.join(paths[:2])}; write the path")
    return column, [paths[0] for paths in found]
