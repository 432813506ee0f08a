"""Images in a column of Parquet or Arrow files, read in order, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effvit.data.sources.base import stamp_of
from effvit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 64  # in memory at a time, of images of any size


class Rows:
    """Images of one file: ``rows`` are int64 ``(n,)``, the rows of the file, and reading is in order or starts anew.

    ``column`` holds bytes, or structs with a field ``bytes``, as Hugging Face's ``datasets`` has them.
    """

    def __init__(self, root: Path, file: str, column: str, rows: np.ndarray) -> None:
        self.root, self.file, self.column, self.rows = root, file, column, rows
        self._batches: Iterator[pa.Array] = iter(())
        self._start = 0  # row of the first in the batch
        self._batch: Any = ()

    def __reduce__(self) -> tuple[Any, ...]:  # without what is open
        return Rows, (self.root, self.file, self.column, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.file}[{self.rows[index]}]"

    def read(self, index: int) -> bytes:
        try:
            value = self._value(int(self.rows[index]))
        except (OSError, ValueError) as error:  # pyarrow's errors are both
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{self.root / self.name(index)}: damaged file ({one_line(error)})") from error
        path = value.get("path") if isinstance(value, dict) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            hint = f", only the path {path!r} of a file elsewhere; store the images in the table" if path else ""
            raise UserError(f"{self.root / self.name(index)}: has no image{hint}")
        return bytes(content)

    def take(self, rows: np.ndarray) -> "Rows":
        return Rows(self.root, self.file, self.column, self.rows[rows])

    def stamp(self) -> list[Any]:
        return [stamp_of(self.root, self.file), self.column, self.rows.tolist()]

    def _value(self, row: int) -> Any:
        if not len(self._batch) or row < self._start:
            first, self._batches = batches_from(self.root / self.file, self.column, row)
            self._start, self._batch = first, next(self._batches)
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = next(self._batches)
        return self._batch[row - self._start].as_py()


def batches_from(path: Path, column: str, row: int) -> "tuple[int, Iterator[pa.Array]]":
    """Batches of a column from the one on that holds ``row`` or comes before it, and the row that it starts with."""
    if is_parquet(path):
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        groups = list(range(group, len(sizes)))
        batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=[column], use_threads=False)
        return int(starts[group]), (batch.column(0) for batch in batches)
    values = open_arrow(path).column(column)
    return row, (values.slice(at, BATCH_ROWS).combine_chunks() for at in range(row, len(values), BATCH_ROWS))


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


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
