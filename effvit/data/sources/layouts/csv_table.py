"""Images and a CSV that names each one's class, as in many competitions: ``train/1.png``, ``trainLabels.csv``."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from effvit.data.sources.base import Split
from effvit.data.sources.layout import TRAIN, WHOLE, Choices, Layout, part_of
from effvit.data.sources.layouts.class_folders import _is_image
from effvit.data.sources.tree import Tree, join
from effvit.errors import UserError, did_you_mean

_SUFFIXES = (".csv", ".tsv")
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
_DEPTH = 3


@dataclass(frozen=True)
class _Table:
    """A CSV: its file, header and rows, and the indices of the columns that matter, where there are such columns."""

    file: str
    header: list[str]
    rows: list[list[str]]
    image: int
    label: int
    split: int | None


def csv_table(tree: Tree, choices: Choices) -> Layout | None:
    """Recognise CSVs next to images or in their folders; a part in a CSV's name or in a column ``split`` counts.

    Columns are known by their usual names, or by ``image_column`` and ``label_column``. A name of an image may have no
    suffix. CSVs of sample submissions are not read, nor are those without a column of labels.
    """
    files = [name for name in _tables(tree) if _SAMPLE not in name.lower()]
    images = _images(tree) if files else {}
    if not images:
        return None
    found = [(file, _read(tree, file, choices)) for file in files]
    tables = [table for _, table in found if table is not None]
    if not tables:
        if len(files) == 1 or choices.image_column or choices.label_column:
            header = _lines(tree, files[0])[0]
            raise UserError(
                f"label_column=None: {tree.root / files[0]} has the columns {', '.join(header)}; name those of images "
                "and classes as image_column=NAME and label_column=NAME"
            )
        return None
    listing: dict[str, list[tuple[str, str]]] = {}
    for table in tables:
        for part, pairs in _resolve(tree, table, images).items():
            if part in listing:
                names = " and ".join(each.file for each in tables)
                raise UserError(f"{tree.root}: {names} are there, expected one CSV for each part")
            listing[part] = pairs
    if WHOLE in listing and len(listing) > 1:
        listing[TRAIN] = listing.pop(WHOLE)
    classes = sorted({label for pairs in listing.values() for _, label in pairs}, key=_number_or_name)
    labelled = {path for pairs in listing.values() for path, _ in pairs}
    unlabelled = sum(path not in labelled for paths in images.values() for path in paths)

    def read(wanted: tuple[str, ...]) -> dict[str, Split]:
        index = {name: number for number, name in enumerate(wanted)}
        splits = {}
        for number, (part, pairs) in enumerate(listing.items()):
            chosen = sorted((index[label], path) for path, label in pairs if label in index)
            notes = Counter({"images that no CSV names, not read": unlabelled} if unlabelled and not number else {})
            labels = np.array([label for label, _ in chosen], dtype=np.int64)
            splits[part] = Split(labels, tree.originals([path for _, path in chosen]), notes)
        return splits

    described = ", ".join(
        f"{table.file} (columns {table.header[table.image]} and {table.header[table.label]})" for table in tables
    )
    return Layout(f"images and {described}", tuple(classes), read)


def _number_or_name(label: str) -> tuple[int, str]:
    return (int(label), label) if label.isdigit() else (-1, label)


def _tables(tree: Tree) -> list[str]:
    """CSVs at the top and in its folders."""
    paths = tree.files() + [join(folder, name) for folder in tree.folders() for name in tree.files(folder)]
    return [path for path in paths if path.lower().endswith(_SUFFIXES)]


def _images(tree: Tree) -> dict[str, list[str]]:
    """Paths of images by folder."""
    found: dict[str, list[str]] = {}
    folders = [("", 0)]
    while folders:
        folder, depth = folders.pop()
        paths = [join(folder, name) for name in tree.files(folder)]
        if images := [path for path in paths if not path.lower().endswith(_SUFFIXES) and _is_image(tree, path)]:
            found[folder] = images
        if depth < _DEPTH:
            folders += [(join(folder, name), depth + 1) for name in tree.folders(folder)]
    return found


def _lines(tree: Tree, file: str) -> list[list[str]]:
    text = tree.read_text(file)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if line]
    except csv.Error as error:
        raise UserError(f"{tree.root / file}: not a CSV ({error})") from error
    return lines or [[]]


def _read(tree: Tree, file: str, choices: Choices) -> _Table | None:
    header, *rows = _lines(tree, file)
    columns = []
    for option, name, usual in (
        ("image_column", choices.image_column, _IMAGE_COLUMNS),
        ("label_column", choices.label_column, _LABEL_COLUMNS),
    ):
        if name is not None and name not in header and not _is_test_of(file):
            raise UserError(
                f"{option}={name}: {tree.root / file} has the columns {', '.join(header)}{did_you_mean(name, header)}"
            )
        columns.append(_find([name] if name else usual, header))
    image, label = columns
    if image is None or label is None or image == label:
        return None
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"{tree.root / file}: line {number} has {len(row)} fields for {len(header)} columns")
        if not row[label].strip():
            raise UserError(f"{tree.root / file}: line {number} has no class in the column {header[label]!r}")
    return _Table(file, header, rows, image, label, _find(_SPLIT_COLUMNS, header))


def _is_test_of(file: str) -> bool:
    return part_of(file) not in (None, TRAIN)


def _find(names: Iterable[str], header: Sequence[str]) -> int | None:
    """The index of the first of ``names`` that the header has, in any case."""
    lowered = [name.strip().lower() for name in header]
    return next((lowered.index(name.lower()) for name in names if name.lower() in lowered), None)


def _resolve(tree: Tree, table: _Table, images: Mapping[str, Sequence[str]]) -> dict[str, list[tuple[str, str]]]:
    """Path and label of each row, by part."""
    part = part_of(table.file.rpartition("/")[2]) or part_of(table.file) or WHOLE
    names = [row[table.image].strip() for row in table.rows]
    paths = _paths(tree, table, images, names, part)
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        labels = {row[table.label] for path, row in zip(paths, table.rows, strict=True) if path == twice[0]}
        what = "classes, as with multi-label images" if len(labels) > 1 else "rows"
        raise UserError(f"{tree.root / table.file}: {twice[0]} has several {what}; expected one row for each image")
    listing: dict[str, list[tuple[str, str]]] = {}
    for path, row in zip(paths, table.rows, strict=True):
        of_row = part
        if table.split is not None:
            said = part_of(row[table.split].strip())
            if said is None:
                raise UserError(
                    f"{tree.root / table.file}: {row[table.split]!r} in the column {table.header[table.split]!r}: "
                    "expected train, validation or test"
                )
            of_row = said
        listing.setdefault(of_row, []).append((path, row[table.label].strip()))
    return listing


def _paths(
    tree: Tree, table: _Table, images: Mapping[str, Sequence[str]], names: Sequence[str], part: str
) -> list[str]:
    """The image that each row names: below the CSV's folder, the root, or the first folder of images that has it."""
    if not names:
        raise UserError(f"{tree.root / table.file}: has no rows")
    everything = {path: path for paths in images.values() for path in paths}
    stems = {path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path: path for path in everything}
    near = table.file.rpartition("/")[0]
    of_part = [folder for folder in images if part_of(folder) == part]
    others = [folder for folder in images if folder not in of_part]
    candidates = [near, "", *of_part, *others]
    best: tuple[int, list[str | None]] = (-1, [])
    for folder in dict.fromkeys(candidates):
        paths = [everything.get(join(folder, name)) or stems.get(join(folder, name)) for name in names]
        count = sum(path is not None for path in paths)
        if count > best[0]:
            best = (count, paths)
    count, paths = best
    if count < len(names):
        first = paths.index(None)
        raise UserError(
            f"{tree.root / table.file}: line {first + 2} names {names[first]!r} in the column "
            f"{table.header[table.image]!r}, and there is no such image ({len(names) - count:,} of {len(names):,} rows)"
        )
    return [path for path in paths if path is not None]
