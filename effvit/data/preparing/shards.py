"""What a prepared data set stores of encoded images: so many rows at a time, each finished part on record."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from effvit.data.loading import encoded, views
from effvit.data.preparing import tally as tallies
from effvit.data.preparing import units
from effvit.data.preparing.tally import Tally
from effvit.data.preparing.units import UNIT_ROWS, Rows, Unit
from effvit.data.sources import images
from effvit.data.sources.base import Originals
from effvit.files import name_file, write_json

SHARD_ROWS = 2048
_BATCH_ROWS = 256  # of an Arrow record batch, which is held in memory
_BUFFER_BYTES = 8 * 2**20


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
    def unit_count(self) -> int:
        """How many `units` there are."""
        return -(-len(self) // UNIT_ROWS)

    @property
    def path(self) -> Path:
        """The file with these rows: an Arrow file of their own, or the array of all rows."""
        suffix = f"-{self.number:05}.arrow" if self.storage == "jpeg" else ".npy"
        return self.work / "data" / f"{self.stored}_images{suffix}"

    @property
    def record(self) -> Path:
        """The file that says that this shard is finished, and what was counted."""
        return self.work / "done" / f"{self.stored}-{self.first:09}.json"

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that decides this shard's content: the originals' stamp, settings, code, libraries."""
        parts: dict[str, Any] = {
            "originals": self.originals.stamp(),
            "in_mean": self.in_mean.tolist(),
            "settings": [self.stored, self.first, self.size, self.storage],
            "libraries": [PIL.__version__, np.__version__],
            "code": [_content(module.__file__) for module in (encoded, images, tallies, units, views)],
            "shard": _content(__file__),
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def finished(self) -> Tally | None:
        """What was counted when this very shard was finished earlier; None if it was not."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            tally = Tally.from_json(record)
            return tally if self.path.exists() and record["fingerprint"] == self.fingerprint else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def units(self) -> Iterator[Unit]:
        """The shard in units, to be read in this order."""
        self.fingerprint  # noqa: B018  # of the originals before they are read
        for start in range(0, len(self), UNIT_ROWS):
            stop = min(start + UNIT_ROWS, len(self))
            part = self.originals.take(np.arange(start, stop))
            yield Unit(part, self.first + start, self.size, self.storage, self.in_mean[start:stop])

    def write(self, rows: Iterable[Rows]) -> Tally:
        """Write what was read of the shard's units, then its record. Rows of damaged images are missing."""
        self.record.unlink(missing_ok=True)
        tally = Tally()
        try:
            (self._write_jpegs if self.storage == "jpeg" else self._write_pixels)(_counted(rows, tally))
        except OSError as error:
            name_file(error, self.path)
            raise
        write_json(self.record, {"fingerprint": self.fingerprint} | tally.as_json())
        return tally

    def _write_pixels(self, stored: Iterator[bytes]) -> None:
        with self.path.open("r+b", buffering=_BUFFER_BYTES) as file:
            file.seek(first_row(self.path) + self.first * self.size * self.size * 3)
            file.writelines(stored)
            to_disk(file)

    def _write_jpegs(self, stored: Iterator[bytes]) -> None:
        import pyarrow as pa

        schema = pa.schema([(encoded.COLUMN, pa.large_binary())])
        with self.path.open("wb") as file:
            with pa.ipc.new_file(file, schema) as sink:
                while batch := list(islice(stored, _BATCH_ROWS)):
                    sink.write_batch(pa.record_batch([pa.array(batch, pa.large_binary())], schema=schema))
            to_disk(file)


def _counted(rows: Iterable[Rows], tally: Tally) -> Iterator[bytes]:
    for unit in rows:
        tally.add(unit.tally)
        yield from unit.stored


def _content(path: str | None) -> str:
    return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()


def first_row(path: Path) -> int:
    """Where the rows of a ``.npy`` file begin."""
    return int(np.load(path, mmap_mode="r").offset)


def to_disk(file: BinaryIO) -> None:
    """Have what was written outlive a loss of power."""
    file.flush()
    os.fsync(file.fileno())
