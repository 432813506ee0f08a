"""Large images, kept as JPEG in Arrow files: any is at hand through a memory map, and workers decode them."""

import bisect
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from effvit.data.loading.stored import Images
from effvit.data.loading.views import evaluation_view, random_view
from effvit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

COLUMN = "jpeg"


class JpegShards:
    """JPEG files by row, in one sequence over memory-mapped Arrow files (IPC format, a binary column ``jpeg``).

    Raises:
        UserError: a file is not a whole Arrow file with that column.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow as pa

        self.paths = tuple(paths)
        chunks: list[pa.Array] = []
        self._ends: list[int] = []  # rows up to the end of each file
        for path in self.paths:
            column = _read_column(path)
            chunks += column.chunks
            self._ends.append(len(column) + (self._ends[-1] if self._ends else 0))
        self._column = pa.chunked_array(chunks, pa.large_binary())

    def __reduce__(self) -> tuple[type, tuple[Sequence[Path]]]:  # a worker maps the files anew
        return JpegShards, (self.paths,)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> memoryview:
        return memoryview(self._column[row].as_buffer())

    def image(self, row: int) -> Image.Image:
        """Decode the JPEG at ``row``; raises `UserError`, which names the file, where it is not a whole RGB one."""
        jpeg = self[row]
        try:
            image = decode(jpeg)
            if image.mode != "RGB":
                raise ValueError(f"its mode is {image.mode}, expected RGB")
            return image
        except Exception as error:  # the decoder raises anything from SyntaxError to struct.error on damaged files
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            number = bisect.bisect_right(self._ends, row)
            within = row - (self._ends[number - 1] if number else 0)
            reason = "not a JPEG" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(
                f"{self.paths[number]}: row {within} is damaged ({reason}); run `effvit prepare` again"
            ) from error


def _read_column(path: Path) -> "pa.ChunkedArray":
    import pyarrow as pa

    try:
        column = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(COLUMN)
        column.validate(full=True)
        if column.type != pa.large_binary() or column.null_count:
            raise ValueError(f"{column.type} with {column.null_count} nulls")
        return column
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None and path.is_file():  # the system's, not the file's
            raise
        raise UserError(f"{path}: truncated or not a shard of images; run `effvit prepare` again") from error


@dataclass(frozen=True)
class EncodedImages(Images):
    """Chosen rows of `JpegShards`, decoded to ``size`` pixels square."""

    shards: JpegShards
    rows: np.ndarray
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), self.size, self.size, 3)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = self.rows[index]
        images = np.empty((rows.size, self.size, self.size, 3), dtype=np.uint8)
        for image, row in zip(images, np.atleast_1d(rows), strict=True):
            image[:] = np.asarray(evaluation_view(self.shards.image(int(row)), self.size))
        return images.reshape(*rows.shape, *images.shape[1:])

    def cropped(self, index: np.ndarray, seed: int, min_crop_area: float) -> np.ndarray:
        """Random crops of the images at ``index``, as `batches` yields them."""
        images = np.empty((len(index), self.size, self.size, 3), dtype=np.uint8)
        for image, row in zip(images, self.rows[index], strict=True):
            rng = np.random.default_rng((seed, int(row)))
            image[:] = np.asarray(random_view(self.shards.image(int(row)), self.size, min_crop_area, rng))
        return images

    def batches(
        self, rows: Sequence[np.ndarray], *, seed: int, workers: int, min_crop_area: float = 1.0
    ) -> Iterator[np.ndarray]:
        import torch
        from torch.utils.data import DataLoader

        loader: DataLoader[torch.Tensor | UserError] = DataLoader(
            _Reader(self, seed, min_crop_area),  # type: ignore[arg-type]
            sampler=rows,
            batch_size=None,  # what the sampler gives is a batch already
            collate_fn=_to_tensor,  # type: ignore[arg-type]
            num_workers=workers,
            # Python 3.14 has a server fork them, and a SIGTERM to all would end it, and its workers with it.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_heed_no_sigterm_but_the_parent_s,
            generator=torch.Generator(),  # or it would draw a number from the global one
        )
        with _sigterm_blocked():
            return map(_to_array, loader)  # starts the workers


def decode(jpeg: bytes | memoryview) -> Image.Image:
    """Decode an RGB JPEG."""
    image = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
    image.load()
    return image


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Workers that are started meanwhile have SIGTERM blocked from their first moment on."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_no_sigterm_but_the_parent_s(worker: int) -> None:
    """End on SIGTERM only where it is the training process that sends it.

    torchrun, Slurm and systemd send it to all, and the step that it falls in needs its batches before the run is saved.
    """
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_await_sigterm_of_the_parent, daemon=True).start()


def _await_sigterm_of_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # as PyTorch's workers do: any other status is reported as a failure


@dataclass(frozen=True)
class _Reader:
    """What a worker does with a batch's indices."""

    images: EncodedImages
    seed: int
    min_crop_area: float

    def __getitem__(self, index: np.ndarray) -> np.ndarray | UserError:
        index = np.asarray(index)
        try:
            if self.min_crop_area == 1:
                return self.images[index]
            return self.images.cropped(index, self.seed, self.min_crop_area)
        except UserError as error:  # raised in a worker it would arrive with the worker's traceback as its message
            return error


def _to_tensor(batch: np.ndarray | UserError) -> "Tensor | UserError":
    import torch

    return batch if isinstance(batch, UserError) else torch.from_numpy(batch)


def _to_array(batch: "Tensor | UserError") -> np.ndarray:
    if isinstance(batch, UserError):
        raise batch
    return batch.numpy()
