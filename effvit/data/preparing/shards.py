"""Encoded images to what a prepared data set stores of them: so many rows at a time, each finished part on record."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image

from effvit.data.loading import encoded, views
from effvit.data.preparing.duplicates import DIGEST_BYTES
from effvit.data.sources import images
from effvit.data.sources.base import Originals
from effvit.errors import UserError
from effvit.files import name_file, write_json

SHARD_ROWS = 2048
_BATCH_ROWS = 256  # of an Arrow record batch, which is held in memory
_BUFFER_BYTES = 8 * 2**20
_MOST_NAMED = 20  # damaged images in one message


@dataclass
class Tally:
    """What was done to images, and how often each level occurs in each channel of some of them: int64 ``(3, 256)``.

    ``damaged`` counts files that are not whole images; ``reasons`` names the first ones, and what is wrong.
    ``digests`` are 16 bytes of each encoded image, in order, under the row of the first; zeros where there is none.
    """

    notes: Counter[str] = field(default_factory=Counter)
    levels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    damaged: int = 0
    reasons: list[str] = field(default_factory=list)
    digests: dict[int, bytearray] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Add what another one counted."""
        self.notes.update(other.notes)
        self.levels += other.levels
        self.damaged += other.damaged
        self.digests.update(other.digests)
        self.reasons = (self.reasons + other.reasons)[:_MOST_NAMED]

    def note_damage(self, error: UserError) -> None:
        """Count a file that is not a whole image."""
        self.add(Tally(damaged=1, reasons=[str(error)]))

    def check(self) -> None:
        """Raise `UserError` where there were damaged images."""
        if self.damaged:
            count = f"{self.damaged:,} images are damaged: " if self.damaged > 1 else ""
            more = f"; and {self.damaged - len(self.reasons):,} more" if self.damaged > len(self.reasons) else ""
            raise UserError(f"{count}{'; '.join(sorted(self.reasons))}{more}")

    def count_levels(self, image: Image.Image) -> None:
        """Add the pixels of an RGB image."""
        self.levels += np.array(image.histogram()).reshape(3, 256)


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of the images that are stored as ``stored`` (train or test): the shard ``number``, from 0.

    ``work`` holds ``data``, the directory that is to be the prepared one, and ``done``, a record of each finished
    shard; ``in_mean`` are the rows that mean and standard deviation are of.
    """

    work: Path
    stored: str
    number: int
    first: int
    size: int
    storage: str
    originals: Originals
    in_mean: np.ndarray

    def __len__(self) -> int:
        return len(self.originals)

    @property
    def path(self) -> Path:
        """The file with these rows: an Arrow file of their own, or the array of all rows."""
        suffix = f"-{self.number:05}.arrow" if self.storage == "jpeg" else ".npy"
        return self.work / "data" / f"{self.stored}_images{suffix}"

    @property
    def record(self) -> Path:
        """The file that says that this shard is finished, and what was counted."""
        return self.work / "done" / f"{self.stored}-{self.first:09}.json"

    def fingerprint(self) -> str:
        """Of everything that decides this shard's content: the originals' stamp, settings, code, libraries."""
        parts: dict[str, Any] = {
            "originals": self.originals.stamp(),
            "in_mean": self.in_mean.tolist(),
            "settings": [self.stored, self.first, self.size, self.storage],
            "libraries": [PIL.__version__, np.__version__],
            "code": [_content(module.__file__) for module in (encoded, images, views)] + [_content(__file__)],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def finished(self) -> Tally | None:
        """What was counted when this very shard was finished earlier; None if it was not."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            fingerprint, tally = record["fingerprint"], Tally(Counter(record["notes"]), np.array(record["levels"]))
            tally.digests[self.first] = bytearray.fromhex(record["digests"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return tally if self.path.exists() and fingerprint == self.fingerprint() else None

    def write(self, on_image: Callable[[], None]) -> Tally:
        """Read the images and write the shard, then its record; ``on_image`` is called after each image.

        Damaged images are counted in what is returned. A shard with one has no record, and is written again.
        """
        fingerprint = self.fingerprint()
        self.record.unlink(missing_ok=True)
        tally = Tally(digests={self.first: bytearray(DIGEST_BYTES * len(self))})
        try:
            (self._write_jpegs if self.storage == "jpeg" else self._write_pixels)(tally, on_image)
        except OSError as error:
            name_file(error, self.path)
            raise
        if tally.damaged:
            return tally
        digests = tally.digests[self.first].hex()
        counted = {"notes": dict(tally.notes), "levels": tally.levels.tolist(), "digests": digests}
        write_json(self.record, {"fingerprint": fingerprint} | counted)
        return tally

    def _original(self, index: int, tally: Tally) -> tuple[bytes, Path]:
        content = self.originals.read(index)
        tally.digests[self.first][index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest(content)
        return content, self.originals.root / self.originals.name(index)

    def _write_pixels(self, tally: Tally, on_image: Callable[[], None]) -> None:
        start = np.load(self.path, mmap_mode="r").offset + self.first * self.size * self.size * 3
        with self.path.open("r+b", buffering=_BUFFER_BYTES) as file:
            file.seek(start)
            for index, in_mean in enumerate(self.in_mean):
                try:
                    pixels, done = images.read_image(*self._original(index, tally), self.size)
                except UserError as error:
                    tally.note_damage(error)
                else:
                    file.write(pixels.tobytes())
                    tally.notes.update(done)
                    if in_mean:
                        tally.count_levels(Image.fromarray(pixels))
                on_image()
            _to_disk(file)

    def _write_jpegs(self, tally: Tally, on_image: Callable[[], None]) -> None:
        import pyarrow as pa

        schema = pa.schema([(encoded.COLUMN, pa.large_binary())])
        jpegs = self._jpegs(tally, on_image)
        with self.path.open("wb") as file:
            with pa.ipc.new_file(file, schema) as sink:
                for start in range(0, len(self), _BATCH_ROWS):
                    rows = min(_BATCH_ROWS, len(self) - start)
                    column = pa.array([next(jpegs) for _ in range(rows)], pa.large_binary())
                    sink.write_batch(pa.record_batch([column], schema=schema))
            _to_disk(file)

    def _jpegs(self, tally: Tally, on_image: Callable[[], None]) -> Iterator[bytes]:
        for index, in_mean in enumerate(self.in_mean):
            try:
                jpeg, done = images.read_jpeg(*self._original(index, tally), self.size)
            except UserError as error:
                tally.note_damage(error)
                jpeg, done = b"", []
            tally.notes.update(done)
            if in_mean and jpeg:
                tally.count_levels(views.evaluation_view(encoded.decode(jpeg), self.size))
            on_image()
            yield jpeg


def digest(image: bytes) -> bytes:
    """Bytes that only byte-identical images share."""
    return hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest()


def cut(work: Path, stored: str, size: int, storage: str, originals: Originals, in_mean: np.ndarray) -> list[Shard]:
    """Divide images into shards of `SHARD_ROWS`."""
    starts = range(0, len(originals), SHARD_ROWS)
    parts = [(start, min(start + SHARD_ROWS, len(originals))) for start in starts]
    return [
        Shard(work, stored, number, part[0], size, storage, originals.take(np.arange(*part)), in_mean[slice(*part)])
        for number, part in enumerate(parts)
    ]


def make_room(shards: Sequence[Shard]) -> None:
    """Remove what is of no shard among these, all of one stored part, and begin the array where there is to be one."""
    first = shards[0]
    paths = {shard.path for shard in shards}
    for stray in set(first.path.parent.glob(f"{first.stored}_*")) - paths:
        stray.unlink()
    if first.storage == "pixels":
        shape = (sum(map(len, shards)), first.size, first.size, 3)
        with first.path.open("r+b" if first.path.exists() else "wb") as file:
            write_header(file, shape)
            file.truncate(file.tell() + math.prod(shape))  # rows that are there stay


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Begin a ``.npy`` file of bytes."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _content(path: str | None) -> str:
    return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()
