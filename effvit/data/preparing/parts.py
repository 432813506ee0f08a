"""The images that are stored as one part, train or test, shard by shard."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from effvit.data.preparing.progress import image_bar
from effvit.data.preparing.shards import SHARD_ROWS, Shard, first_row, to_disk
from effvit.data.preparing.tally import Tally
from effvit.data.preparing.units import Rows
from effvit.data.preparing.workers import Reader
from effvit.data.sources.base import Originals

_CHUNK_BYTES = 8 * 2**20


def write_part(shards: Sequence[Shard], read: Reader, bar: str, skip_damaged: bool) -> Tally:
    """Write all shards of a part that are not finished, with a progress bar, and return what was counted of all.

    Shards with damaged images are read again, unless these are to be skipped.
    """
    earlier = [shard.finished() for shard in shards]
    finished = [tally if tally and (skip_damaged or not tally.damaged) else None for tally in earlier]
    missing = [shard for shard, tally in zip(shards, finished, strict=True) if tally is None]
    _make_room(shards)
    rows = read(unit for shard in missing for unit in shard.units())
    images, total = sum(map(len, shards)), Tally()
    with image_bar(bar, images, already=images - sum(map(len, missing))) as at:
        counted = _progress(rows, at)
        for shard, tally in zip(shards, finished, strict=True):
            total.add(tally or shard.write(islice(counted, shard.unit_count)))
    return total


def _progress(rows: Iterator[Rows], at: Callable[[int], None]) -> Iterator[Rows]:
    count = 0
    for unit in rows:
        yield unit
        count += unit.count
        at(count)


def cut(work: Path, stored: str, size: int, storage: str, originals: Originals, in_mean: np.ndarray) -> list[Shard]:
    """Divide images into shards of `SHARD_ROWS`."""
    starts = range(0, len(originals), SHARD_ROWS)
    parts = [(start, min(start + SHARD_ROWS, len(originals))) for start in starts]
    return [
        Shard(work, stored, number, start, size, storage, originals.take(np.arange(start, stop)), in_mean[start:stop])
        for number, (start, stop) in enumerate(parts)
    ]


def _make_room(shards: Sequence[Shard]) -> None:
    """Remove what is of no shard among these, all of one stored part, and begin the array where there is to be one."""
    first = shards[0]
    paths = {shard.path for shard in shards}
    for stray in set(first.path.parent.glob(f"{first.stored}_*")) - paths:
        stray.unlink()
    if first.storage == "pixels":
        _resize(first, sum(map(len, shards)))


def close_gaps(shards: Sequence[Shard], damaged: Collection[int]) -> None:
    """Move rows up to where rows of damaged images would be, and end the array there; JPEGs have no such gaps."""
    if shards[0].storage == "jpeg":
        return
    missing = np.array(sorted(damaged), dtype=np.int64)
    kept = [
        len(shard) - int(((missing >= shard.first) & (missing < shard.first + len(shard))).sum()) for shard in shards
    ]
    for shard in shards:
        if shard.first + len(shard) > missing[0]:
            shard.record.unlink()  # a shard that is moved is no longer where its record says
    row_bytes, start, total = shards[0].size ** 2 * 3, first_row(shards[0].path), 0
    with shards[0].path.open("r+b") as file:
        for shard, count in zip(shards, kept, strict=True):
            _move(file, start + shard.first * row_bytes, start + total * row_bytes, count * row_bytes)
            total += count
        to_disk(file)
    _resize(shards[0], total)


def _move(file: BinaryIO, source: int, target: int, length: int) -> None:
    """Move bytes towards the beginning of a file."""
    for done in range(0, length if target < source else 0, _CHUNK_BYTES):
        file.seek(source + done)
        chunk = file.read(min(_CHUNK_BYTES, length - done))
        file.seek(target + done)
        file.write(chunk)


def _resize(shard: Shard, rows: int) -> None:
    """Begin the array that a shard is in, or give it another number of rows; rows that are there stay."""
    shape = (rows, shard.size, shard.size, 3)
    with shard.path.open("r+b" if shard.path.exists() else "wb") as file:
        write_header(file, shape)
        file.truncate(file.tell() + math.prod(shape))


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Begin a ``.npy`` file of bytes; NumPy's header is of one length for any number of rows."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
