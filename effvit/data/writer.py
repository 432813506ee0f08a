"""Writes a source in the prepared format; the same source gives the same bytes."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from effvit.data.holdout import hold_out
from effvit.data.prepared import FORMAT_VERSION, META_FILE, SPLITS, Meta
from effvit.data.source import Source
from effvit.errors import UserError
from effvit.files import staged_dir, write_json

_VALIDATION_EVERY = 10
_CHUNK_BYTES = 8 * 2**20
_ONE_LEVEL = 1 / 255  # the least standard deviation, so that a constant channel can be divided by it


def write_prepared(source: Source, name: str, image_size: int, output_dir: Path) -> None:
    """Write ``source`` to ``output_dir`` as a whole or not at all, with a progress bar on stderr."""
    train_indices, validation_indices = _partition(source)
    with staged_dir(output_dir) as aside:
        with Progress(console=Console(stderr=True)) as progress:
            for stored, split in (("train", source.train), ("test", source.test)):
                shape = (len(split.labels), image_size, image_size, 3)
                images = progress.track(split.images, total=shape[0], description=f"{name} {stored}")
                _write_images(aside / f"{stored}_images.npy", images, shape)
                np.save(aside / f"{stored}_labels.npy", split.labels)
        np.save(aside / "train_indices.npy", train_indices)
        np.save(aside / "validation_indices.npy", validation_indices)
        mean, std = _channel_statistics(aside / "train_images.npy", train_indices)
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
            notes={"train": dict(sorted(source.train.notes.items())), "test": dict(sorted(source.test.notes.items()))},
        )
        write_json(aside / META_FILE, asdict(meta))


def _partition(source: Source) -> tuple[np.ndarray, np.ndarray]:
    counts = np.bincount(source.train.labels, minlength=len(source.classes))
    for name, count in zip(source.classes, counts, strict=True):
        if count < 2:
            raise UserError(f"class {name!r} has {count} training images, expected at least 2 (one for validation)")
    return hold_out(source.train.labels, every=_VALIDATION_EVERY)


def _write_images(path: Path, images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    # Written in sequence, not through a memory map: on a full disk a map kills the process (SIGBUS) with no message.
    count = 0
    with path.open("wb", buffering=_CHUNK_BYTES) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for count, image in enumerate(images, start=1):
            if image.shape != shape[1:] or image.dtype != np.uint8:
                raise ValueError(f"image {count} is {image.dtype} {image.shape}, expected uint8 {shape[1:]}")
            file.write(image.tobytes())
    if count != shape[0]:
        raise ValueError(f"the source gave {count} images for {shape[0]} labels")


def _channel_statistics(path: Path, rows: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel (0 to 1) of ``rows``, from exact integer histograms."""
    images = np.load(path, mmap_mode="r")
    histogram = np.zeros((3, 256), dtype=np.int64)
    step = max(1, _CHUNK_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(rows), step):
        chunk = images[rows[start : start + step]]
        for channel in range(3):
            histogram[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)  # (3, 256)
    mean = weights @ levels
    std = np.sqrt(np.maximum((weights * (levels - mean[:, None]) ** 2).sum(axis=1), 0))
    m, s = mean.round(6).tolist(), np.maximum(std, _ONE_LEVEL).round(6).tolist()
    return (m[0], m[1], m[2]), (s[0], s[1], s[2])
