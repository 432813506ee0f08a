"""Writes a source in the prepared format; the same source gives the same bytes, interrupted or not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from effvit.data.loading.prepared import (
    DAMAGED_FILE,
    DUPLICATES_FILE,
    FORMAT_VERSION,
    META_FILE,
    SPLITS,
    Meta,
    files_path,
    write_files,
)
from effvit.data.preparing.damaged import report_damaged
from effvit.data.preparing.duplicates import DIGEST_BYTES, Stored, digest, write_duplicates
from effvit.data.preparing.parts import close_gaps, cut, write_header, write_part
from effvit.data.preparing.progress import image_bar
from effvit.data.preparing.shards import Shard
from effvit.data.preparing.tally import Tally
from effvit.data.preparing.units import UNIT_ROWS
from effvit.data.preparing.workers import Reader, reader
from effvit.data.preparing.workspace import workspace
from effvit.data.sources.base import Originals, Source, Split
from effvit.data.sources.holdout import hold_out
from effvit.errors import UserError
from effvit.files import write_json

LARGEST_PIXELS = 64  # beyond this size files are stored as JPEG: docs/data.md
_VALIDATION_EVERY = 10
_CHUNK_BYTES = 8 * 2**20
_ONE_LEVEL = 1 / 255  # the smallest standard deviation, so that a constant channel can be divided by it


@dataclass
class _Part:
    """A stored part, train or test, of which ``in_mean`` images count for mean and standard deviation."""

    stored: str
    split: Split
    in_mean: np.ndarray
    tally: Tally = field(default_factory=Tally)
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the split that are stored: all but those of damaged images."""
        return np.delete(np.arange(len(self.split.labels)), list(self.tally.damaged))

    def name(self, row: int) -> str:
        """What the image at a row of the split is called."""
        images = self.split.images
        return images.name(row) if isinstance(images, Originals) else f"{self.stored}[{row}]"


def write_prepared(
    source: Source, name: str, image_size: int, output_dir: Path, workers: int = 1, *, skip_damaged: bool = False
) -> None:
    """Write ``source`` to ``output_dir`` as a whole or not at all, with progress on stderr.

    Encoded images are read by up to ``workers`` processes. What a killed run finished of them stays next to the output,
    in ``.<name of output_dir>.partial``, and is taken from there by the next run, as far as nothing changed since.
    With ``skip_damaged`` damaged images are left out; which of the others are validation does not depend on them.

    Raises:
        UserError: a class with too few images to hold one out; damaged images, after all were read; what `workspace`
            and `reader` raise.
    """
    train, validation = _partition(source)
    in_mean = np.zeros(len(source.train.labels), dtype=bool)
    in_mean[train] = True
    parts = (
        _Part("train", source.train, in_mean),
        _Part("test", source.test, np.zeros(len(source.test.labels), dtype=bool)),
    )
    from_files = isinstance(source.train.images, Originals)
    storage: Literal["pixels", "jpeg"] = "jpeg" if from_files and image_size > LARGEST_PIXELS else "pixels"
    with workspace(output_dir) as work:
        with reader(min(workers, sum(-(-len(part.in_mean) // UNIT_ROWS) for part in parts))) as read:
            for part in parts:
                _write_images(part, work, image_size, storage, read, f"{name} {part.stored}", skip_damaged)
        # not before all are read, to name all that are damaged at once
        report_damaged(work, [(part.split.images, part.tally.damaged) for part in parts], skip_damaged)
        splits = {
            "train": _positions(parts[0].rows, train),
            "validation": _positions(parts[0].rows, validation),
            "test": np.arange(len(parts[1].rows)),
        }
        if any(part.tally.damaged for part in parts):
            _check_left(source, parts[0], splits)
        notes = _write_lists(work / "data", parts, splits, source.classes)
        mean, std = channel_statistics(parts[0].tally.levels)
        meta = Meta(
            format_version=FORMAT_VERSION,
            name=name,
            classes=source.classes,
            image_size=image_size,
            counts={split: len(splits[split]) for split in SPLITS},
            mean=mean,
            std=std,
            source=source.description,
            notes=notes,
            storage=storage,
        )
        write_json(work / "data" / META_FILE, asdict(meta))


def _partition(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training and of validation."""
    given = source.validation
    rows = np.arange(len(source.train.labels), dtype=np.int64)
    train = rows if given is None else np.delete(rows, given)
    least, why = (2, "at least 2 (one for validation)") if given is None else (1, "at least 1")
    counts = np.bincount(source.train.labels[train], minlength=len(source.classes))
    for name, count in zip(source.classes, counts, strict=True):
        if count < least:
            raise UserError(f"class {name!r} has {count} training images, expected {why}")
    return hold_out(source.train.labels, every=_VALIDATION_EVERY) if given is None else (train, given)


def _write_images(part: _Part, work: Path, size: int, storage: str, read: Reader, bar: str, skip_damaged: bool) -> None:
    if isinstance(part.split.images, Originals):
        part.shards = cut(work, part.stored, size, storage, part.split.images, part.in_mean)
        part.tally = write_part(part.shards, read, bar, skip_damaged)
    else:
        path = work / "data" / f"{part.stored}_images.npy"
        part.tally = _write_arrays(path, part.split.images, (len(part.in_mean), size, size, 3), part.in_mean, bar)


def _stored_name(part: _Part, rows: np.ndarray, index: int) -> str:
    return part.name(int(rows[index]))


def _positions(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions in ``rows`` of those that are ``wanted``, int64, ascending."""
    return np.flatnonzero(np.isin(rows, wanted)).astype(np.int64)


def _check_left(source: Source, train: _Part, splits: Mapping[str, np.ndarray]) -> None:
    """Raise `UserError` where skipping damaged images leaves a class or a split empty."""
    counts = np.bincount(train.split.labels[train.rows][splits["train"]], minlength=len(source.classes))
    for name, count in zip(source.classes, counts, strict=True):
        if not count:
            raise UserError(f"class {name!r}: without the damaged images there is none to train on; replace them")
    for split, rows in splits.items():
        if not len(rows):
            raise UserError(f"{split}: there is no image without the damaged ones; replace them")


def _write_lists(
    data: Path, parts: Iterable[_Part], splits: Mapping[str, np.ndarray], classes: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """Write all that is stored next to the images; returns the notes of each part."""
    notes, alike = {}, {}
    for part in parts:
        labels = part.split.labels[part.rows]
        np.save(data / f"{part.stored}_labels.npy", labels)
        if part.tally.damaged:
            close_gaps(part.shards, part.tally.damaged)
        if isinstance(part.split.images, Originals):
            write_files(files_path(data, part.stored), map(part.name, part.rows.tolist()))
        left_out = Counter({f"damaged images left out, see {DAMAGED_FILE}": len(part.tally.damaged)})
        without = Counter({"classes without an image": len(set(range(len(classes))) - set(labels.tolist()))})
        notes[part.stored] = part.split.notes + part.tally.notes + left_out + without
        digests = np.frombuffer(part.tally.digests, np.uint8).reshape(-1, DIGEST_BYTES)[part.rows]
        which = np.full(len(labels), SPLITS.index(part.stored), dtype=np.int8)
        if part.stored == "train":
            which[splits["validation"]] = SPLITS.index("validation")
        alike[part.stored] = Stored(digests, which, labels, partial(_stored_name, part, part.rows))
    for stored, found in write_duplicates(data / DUPLICATES_FILE, alike, classes).items():
        notes[stored] += found
    for split in ("train", "validation"):
        np.save(data / f"{split}_indices.npy", splits[split])
    return {stored: dict(sorted(counts.items())) for stored, counts in notes.items()}


def _write_arrays(
    path: Path, images: Iterable[np.ndarray], shape: tuple[int, ...], in_mean: np.ndarray, bar: str
) -> Tally:
    # Written in sequence, not through a memory map: on a full disk a map kills the process (SIGBUS) with no message.
    tally, count = Tally(), 0
    with path.open("wb", buffering=_CHUNK_BYTES) as file, image_bar(bar, shape[0]) as at:
        write_header(file, shape)
        for count, image in enumerate(images, start=1):
            if image.shape != shape[1:] or image.dtype != np.uint8:
                raise ValueError(f"image {count} is {image.dtype} {image.shape}, expected uint8 {shape[1:]}")
            if count <= shape[0] and in_mean[count - 1]:
                tally.count_levels(Image.fromarray(image))
            tally.digests += digest(image.tobytes())
            file.write(image.tobytes())
            at(count)
    if count != shape[0]:
        raise ValueError(f"the source gave {count} images for {shape[0]} labels")
    return tally


def channel_statistics(levels: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel (0 to 1) from how often each level occurs, ``(3, 256)``."""
    scale = np.arange(256) / 255
    weights = levels / levels.sum(axis=1, keepdims=True)  # (3, 256)
    mean = weights @ scale
    std = np.sqrt(np.maximum((weights * (scale - mean[:, None]) ** 2).sum(axis=1), 0))
    m, s = mean.round(6).tolist(), np.maximum(std, _ONE_LEVEL).round(6).tolist()
    return (m[0], m[1], m[2]), (s[0], s[1], s[2])
