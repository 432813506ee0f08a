r"""The one prepared format, which every data set becomes before training.

A prepared directory holds

- images, up to 64 pixels square: ``train_images.npy``, ``test_images.npy``, uint8 ``(n, image_size, image_size, 3)``,
  RGB, memory-mapped when loaded;
- larger images that come from files: ``train_images-00000.arrow`` and so on, see `effvit.data.loading.encoded`;
- ``train_labels.npy``, ``test_labels.npy``: int64 ``(n,)``;
- ``train_files.csv``, ``test_files.csv``, of images that have a name: one column ``file``, the path of each image below
  the data set's root, in the order of the images. Bytes that are no UTF-8 are escaped as ``\udcff``;
- ``train_indices.npy``, ``validation_indices.npy``: int64, a partition of the rows of ``train_images``; validation is
  the source's own validation part, else one image in ten of each class by `effvit.data.sources.holdout.hold_out`;
- ``duplicates.csv``, where there are byte-identical images in two parts or two classes: their group, part, class, file;
- ``meta.json``: the fields of `Meta`.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from effvit.data.loading.encoded import EncodedImages, JpegShards
from effvit.data.loading.stored import Images, PixelImages
from effvit.errors import UserError, explain

__all__ = ["FORMAT_VERSION", "META_FILE", "SPLITS", "Images", "Meta", "PreparedDataset"]

FORMAT_VERSION = 1
META_FILE = "meta.json"
DUPLICATES_FILE, DAMAGED_FILE = "duplicates.csv", "damaged.csv"
FILES = (META_FILE, "*.npy", "*_images-*.arrow", "*_files.csv", DUPLICATES_FILE, DAMAGED_FILE)
"""Patterns of what a prepared data set consists of."""
SPLITS = ("train", "validation", "test")
STORED = ("train", "test")
_FILE_COLUMN = "file"
_ARRAYS = ("train_labels", "test_labels", "train_indices", "validation_indices")

_Level = Annotated[float, Field(ge=0, le=1)]
_Deviation = Annotated[float, Field(gt=0, le=1)]  # images are divided by it


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What ``meta.json`` says of a prepared data set.

    ``counts`` are images per split. ``mean`` and ``std`` are per channel on a scale of 0 to 1, computed from the
    training part alone (without validation) as evaluation sees it. ``notes`` counts per stored part what was done to
    its images. ``storage`` is how images are kept.
    """

    format_version: int
    name: str
    classes: tuple[str, ...]
    image_size: Annotated[int, Field(gt=0)]
    counts: dict[str, int]
    mean: tuple[_Level, _Level, _Level]
    std: tuple[_Deviation, _Deviation, _Deviation]
    source: str
    notes: dict[str, dict[str, int]]
    storage: Literal["pixels", "jpeg"] = "pixels"


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedDataset(Meta):
    """A prepared data set: the fields of `Meta`, the stored images of train and test, and the arrays by name.

    ``file_lists`` are the paths of ``train_files.csv`` and ``test_files.csv``, where there are such files.
    """

    images: Mapping[str, np.ndarray | JpegShards]
    arrays: Mapping[str, np.ndarray]
    file_lists: Mapping[str, Path]
    __hash__ = object.__hash__  # not of its fields, as it is no other data set's equal

    def __eq__(self, other: object) -> bool:
        return self is other

    @classmethod
    def load(cls, directory: Path) -> "PreparedDataset":
        """Open what `effvit prepare` wrote to ``directory``; raises `UserError` if it is not a whole, sound one."""
        meta = _read_meta(directory)
        images = {stored: _open_images(directory, stored, meta) for stored in STORED}
        arrays = {name: np.array(_read_array(directory / f"{name}.npy")) for name in _ARRAYS}
        problem = _find_mismatch(meta, images, arrays)
        if problem:
            raise UserError(f"{directory}: {problem}; run `effvit prepare` again")
        lists = {stored: path for stored in STORED if (path := files_path(directory, stored)).exists()}
        return cls(**vars(meta), images=images, arrays=arrays, file_lists=lists)

    def split(self, name: str) -> tuple[Images, np.ndarray]:
        """Images ``(n, H, W, 3)`` uint8, read when indexed, and int64 labels ``(n,)`` of one of ``SPLITS``."""
        if name not in SPLITS:
            raise ValueError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        stored = "test" if name == "test" else "train"
        images, labels = self.images[stored], self.arrays[f"{stored}_labels"]
        rows = np.arange(len(labels)) if name == "test" else self.arrays[f"{name}_indices"]
        if isinstance(images, JpegShards):
            return EncodedImages(images, rows, self.image_size), labels[rows]
        return PixelImages(images, rows), labels[rows]

    def files(self, name: str) -> list[str] | None:
        """Path of each image of one of ``SPLITS`` below the data set's root; None where images have no names.

        The list is read when it is asked for, as it may be long. Raises `UserError` if it does not fit the images.
        """
        stored = "test" if name == "test" else "train"
        if stored not in self.file_lists:
            return None
        files = _read_files(self.file_lists[stored], len(self.arrays[f"{stored}_labels"]))
        return files if name == "test" else [files[row] for row in self.arrays[f"{name}_indices"]]


def files_path(directory: Path, stored: str) -> Path:
    """Where a prepared data set lists the files of a stored part."""
    return directory / f"{stored}_files.csv"


def write_files(path: Path, files: Iterable[str]) -> None:
    """Write the list of files of a stored part."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([_FILE_COLUMN])
        rows.writerows([name] for name in files)


def _read_files(path: Path, count: int) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *files = (name for (name,) in csv.reader(file))
        if header != _FILE_COLUMN:
            raise ValueError(header)
    except (ValueError, csv.Error) as error:  # no header, a row of several fields, no UTF-8
        raise UserError(f"{path}: not a list of files; run `effvit prepare` again") from error
    if len(files) != count:
        raise UserError(f"{path}: {len(files)} files for {count} images; run `effvit prepare` again")
    return files


def _read_meta(directory: Path) -> Meta:
    path = directory / META_FILE
    if not path.is_file():
        raise UserError(f"{directory}: not a prepared data set (no {META_FILE}); run `effvit prepare`")
    text = path.read_bytes()
    try:
        version = TypeAdapter(dict).validate_json(text).get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{directory}: prepared in format version {version}, this effvit reads version {FORMAT_VERSION}; "
                "run `effvit prepare` again"
            )
        return TypeAdapter(Meta).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}; run `effvit prepare` again") from error


def _open_images(directory: Path, stored: str, meta: Meta) -> np.ndarray | JpegShards:
    if meta.storage == "jpeg":
        return JpegShards(sorted(directory.glob(f"{stored}_images-*.arrow")))
    return _read_array(directory / f"{stored}_images.npy")


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # which no header makes larger than its file
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; run `effvit prepare` again") from error
    except Exception as error:  # anything from TokenError to OverflowError, as the header is damaged
        systems = isinstance(error, OSError) and error.errno is not None and path.is_file()
        if systems or isinstance(error, MemoryError):
            raise
        raise UserError(f"{path}: truncated or not an array; run `effvit prepare` again") from error
    return array.view(np.ndarray)  # a plain array over the map: np.memmap bookkeeping slows every indexing


def _find_mismatch(
    meta: Meta, images: Mapping[str, np.ndarray | JpegShards], arrays: Mapping[str, np.ndarray]
) -> str | None:
    for name, array in arrays.items():
        if array.dtype != np.int64 or array.ndim != 1:
            return f"{name}.npy is {array.dtype} {array.shape}, expected int64 (n,)"
    for stored, pixels in images.items():
        tail = (meta.image_size, meta.image_size, 3)
        if isinstance(pixels, np.ndarray) and (pixels.dtype != np.uint8 or pixels.shape[1:] != tail):
            return f"{stored}_images.npy is {pixels.dtype} {pixels.shape}, which does not fit {META_FILE}"
        labels = arrays[f"{stored}_labels"]
        if len(labels) != len(pixels):
            return f"{len(pixels)} images of {stored} but {len(labels)} labels in {stored}_labels.npy"
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(meta.classes):
            return f"{stored}_labels.npy has labels outside 0 to {len(meta.classes) - 1}"
    rows = np.concatenate([arrays["train_indices"], arrays["validation_indices"]])
    if not np.array_equal(np.sort(rows), np.arange(len(arrays["train_labels"]))):
        return "train_indices.npy and validation_indices.npy do not partition the training images"
    lengths = (len(arrays["train_indices"]), len(arrays["validation_indices"]), len(arrays["test_labels"]))
    counts = dict(zip(SPLITS, lengths, strict=True))
    for name, count in counts.items():
        if not count:
            return f"{name} has no images"
    return None if counts == meta.counts else f"{META_FILE} counts {meta.counts}, the arrays hold {counts}"
