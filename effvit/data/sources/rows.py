"""Images in a column of Parquet or Arrow files, read in order, a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effvit.data.sources.base import stamp_of
from effvit.data.sources.reading import reading
from effvit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 64  # in memory at a time, of images of any size


@dataclass(frozen=True)
class Rows:
    """Images of one file: ``rows`` are int64 ``(n,)``, the rows of the file.

    ``column`` holds bytes, or structs with a field ``bytes``, as Hugging Face's ``datasets`` has them.
    """

    root: Path
    file: str
    column: str
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.file}[{self.rows[index]}]"

    def read(self, index: int) -> bytes:
        with reading(self.root / self.name(index)):
            value = _cursor(self.root / self.file, self.column, self._version).value(int(self.rows[index]))
        path = value.get("path") if isinstance(value, dict) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            hint = f", only the path {path!r} of a file elsewhere; store the images in the table" if path else ""
            raise UserError(f"{self.root / self.name(index)}: has no image{hint}")
        return bytes(content)

    def take(self, rows: np.ndarray) -> "Rows":
        return Rows(self.root, self.file, self.column, self.rows[rows])

    def stamp(self) -> list[Any]:
        return [str(self.root.absolute()), stamp_of(self.root, self.file), self.column, self.rows.tolist()]

    @cached_property
    def _version(self) -> tuple[Any, ...]:
        return tuple(stamp_of(self.root, self.file))


@lru_cache(maxsize=1)
def _cursor(path: Path, column: str, version: tuple[Any, ...]) -> "_Cursor":
    """The place in a file where this process reads: lots of the same file, one after another, share it."""
    return _Cursor(path, column)


class _Cursor:
    """A column, read in order within a row group, or anew from where another row is. One batch is in memory."""

    def __init__(self, path: Path, column: str) -> None:
        self._column = _ParquetColumn(path, column) if is_parquet(path) else _ArrowColumn(path, column)
        self._batches: Iterator[pa.Array] = iter(())
        self._batch: Any = ()
        self._start = self._stop = 0  # row of the first in the batch, and that before which the batches end

    def value(self, row: int) -> Any:
        """The value at a row: bytes, a dictionary, or None."""
        try:
            if not self._start <= row < self._stop:
                self._start, self._stop, self._batches = self._column.batches(row)
                self._batch = next(self._batches)
            while row >= self._start + len(self._batch):
                self._start += len(self._batch)
                self._batch = next(self._batches)
        except Exception as error:
            self._stop = self._start  # nothing more comes of these batches
            if isinstance(error, StopIteration):
                raise ValueError("it has fewer rows than it declares") from error
            raise
        return self._batch[row - self._start].as_py()


class _ParquetColumn:
    def __init__(self, path: Path, name: str) -> None:
        import pyarrow.parquet as pq

        self._file, self._name = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False), name
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def batches(self, row: int) -> "tuple[int, int, Iterator[pa.Array]]":
        """Batches of the row group with ``row``, the row that they start with and that before which they end."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        batches = self._file.iter_batches(
            batch_size=BATCH_ROWS, row_groups=[group], columns=[self._name], use_threads=False
        )
        return int(self._starts[group]), int(self._starts[group + 1]), (batch.column(0) for batch in batches)


class _ArrowColumn:
    def __init__(self, path: Path, name: str) -> None:
        self._values = open_arrow(path).column(name)

    def batches(self, row: int) -> "tuple[int, int, Iterator[pa.Array]]":
        """A batch from ``row`` on, over the memory map, the row and that before which it ends."""
        values = self._values.slice(row, BATCH_ROWS)
        values.validate(full=True)  # or a wrong offset would read elsewhere in memory
        batch = values.combine_chunks()
        return row, row + len(batch), iter([batch])


def open_arrow(path: Path) -> "pa.Table":
    """The table in an Arrow file, in either format, over a memory map."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def is_parquet(path: Path) -> bool:
    """Whether a file is named as Parquet."""
    return path.suffix.lower() in (".parquet", ".pq")
