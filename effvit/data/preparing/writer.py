"""Writes a source in the prepared format; the same source gives the same bytes, interrupted or not."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from effvit.data.loading.prepared import DUPLICATES_FILE, FORMAT_VERSION, META_FILE, SPLITS, Meta
from effvit.data.preparing.duplicates import DIGEST_BYTES, Stored, write_duplicates
from effvit.data.preparing.progress import image_bar
from effvit.data.preparing.shards import Tally, cut, digest, write_header
from effvit.data.preparing.workers import write_shards
from effvit.data.preparing.workspace import workspace
from effvit.data.sources.base import Originals, Source, Split
from effvit.data.sources.holdout import hold_out
from effvit.errors import UserError
from effvit.files import write_json

LARGEST_PIXELS = 64  # beyond this size files are stored as JPEG: docs/data.md
_VALIDATION_EVERY = 10
_CHUNK_BYTES = 8 * 2**20
_ONE_LEVEL = 1 / 255  # the smallest standard deviation, so that a constant channel can be divided by it


def write_prepared(source: Source, name: str, image_size: int, output_dir: Path, workers: int = 1) -> None:
    """Write ``source`` to ``output_dir`` as a whole or not at all, with progress on stderr.

    Files are read by up to ``workers`` processes. What a killed run finished of them stays next to the output, in
    ``.<name of output_dir>.partial``, and is taken from there by the next run, as far as nothing changed since.

    Raises:
        UserError: a class with too few images to hold one out; damaged images, after all were read; what `workspace`
            and `write_shards` raise.
    """
    train_indices, validation_indices = _partition(source)
    in_mean = np.zeros(len(source.train.labels), dtype=bool)
    in_mean[train_indices] = True
    splits = {"train": (source.train, in_mean), "test": (source.test, np.zeros(len(source.test.labels), dtype=bool))}
    from_files = isinstance(source.train.images, Originals)
    storage: Literal["pixels", "jpeg"] = "jpeg" if from_files and image_size > LARGEST_PIXELS else "pixels"
    with workspace(output_dir) as work:
        total, notes, alike = Tally(), {}, {}
        for stored, (split, counted) in splits.items():
            bar = f"{name} {stored}"
            if isinstance(split.images, Originals):
                tally = write_shards(cut(work, stored, image_size, storage, split.images, counted), workers, bar)
            else:
                path = work / "data" / f"{stored}_images.npy"
                tally = _write_arrays(path, split.images, (len(counted), image_size, image_size, 3), counted, bar)
            digests = b"".join(tally.digests.pop(first) for first in sorted(tally.digests))
            parts = np.full(len(counted), SPLITS.index(stored), dtype=np.int8)
            alike[stored] = Stored(
                np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES), parts, split.labels, _namer(split, stored)
            )
            total.add(tally)
            notes[stored] = split.notes + tally.notes
            np.save(work / "data" / f"{stored}_labels.npy", split.labels)
        total.check()  # not before all are read, to name all that are damaged at once
        alike["train"].parts[validation_indices] = SPLITS.index("validation")
        for stored, found in write_duplicates(work / "data" / DUPLICATES_FILE, alike, source.classes).items():
            notes[stored] += found
        np.save(work / "data" / "train_indices.npy", train_indices)
        np.save(work / "data" / "validation_indices.npy", validation_indices)
        mean, std = channel_statistics(total.levels)
        lengths = (len(train_indices), len(validation_indices), len(source.test.labels))
        meta = Meta(
            format_version=FORMAT_VERSION,
            name=name,
            classes=source.classes,
            image_size=image_size,
            counts=dict(zip(SPLITS, lengths, strict=True)),
            mean=mean,
            std=std,
            source=source.description,
            notes={stored: dict(sorted(counts.items())) for stored, counts in notes.items()},
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


def _namer(split: Split, stored: str) -> Callable[[int], str]:
    return split.images.name if isinstance(split.images, Originals) else lambda row: f"{stored}[{row}]"


def _write_arrays(
    path: Path, images: Iterable[np.ndarray], shape: tuple[int, ...], in_mean: np.ndarray, bar: str
) -> Tally:
    # Written in sequence, not through a memory map: on a full disk a map kills the process (SIGBUS) with no message.
    tally, count = Tally(digests={0: bytearray()}), 0
    with path.open("wb", buffering=_CHUNK_BYTES) as file, image_bar(bar, shape[0]) as at:
        write_header(file, shape)
        for count, image in enumerate(images, start=1):
            if image.shape != shape[1:] or image.dtype != np.uint8:
                raise ValueError(f"image {count} is {image.dtype} {image.shape}, expected uint8 {shape[1:]}")
            if count <= shape[0] and in_mean[count - 1]:
                tally.count_levels(Image.fromarray(image))
            tally.digests[0] += digest(image.tobytes())
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
