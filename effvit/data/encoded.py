"""Large images, kept as JPEG in Arrow files: any is at hand through a memory map, and workers decode them."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from effvit.data.stored import Images
from effvit.data.views import evaluation_view, random_view
from effvit.errors import UserError

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
        for path in self.paths:
            try:
                column = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(COLUMN)
                column.validate(full=True)
            except (pa.ArrowInvalid, KeyError) as error:
                raise UserError(f"{path}: truncated or not a shard of images; run `effvit prepare` again") from error
            chunks += column.chunks
        self._column = pa.chunked_array(chunks, pa.large_binary())

    def __reduce__(self) -> tuple[type, tuple[Sequence[Path]]]:  # a worker maps the files anew
        return JpegShards, (self.paths,)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> memoryview:
        return memoryview(self._column[row].as_buffer())


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
            image[:] = np.asarray(evaluation_view(decode(self.shards[int(row)]), self.size))
        return images.reshape(*rows.shape, *images.shape[1:])

    def cropped(self, index: np.ndarray, seed: int, min_crop_area: float) -> np.ndarray:
        """Random crops of the images at ``index``, as `batches` yields them."""
        images = np.empty((len(index), self.size, self.size, 3), dtype=np.uint8)
        for image, row in zip(images, self.rows[index], strict=True):
            rng = np.random.default_rng((seed, int(row)))
            image[:] = np.asarray(random_view(decode(self.shards[int(row)]), self.size, min_crop_area, rng))
        return images

    def batches(
        self, rows: Sequence[np.ndarray], *, seed: int, workers: int, min_crop_area: float = 1.0
    ) -> Iterator[np.ndarray]:
        import torch
        from torch.utils.data import DataLoader

        loader: DataLoader[torch.Tensor] = DataLoader(
            _Reader(self, seed, min_crop_area),  # type: ignore[arg-type]
            sampler=rows,
            batch_size=None,  # what the sampler gives is a batch already
            collate_fn=torch.from_numpy,
            num_workers=workers,
            generator=torch.Generator(),  # or it would draw a number from the global one
        )
        return (batch.numpy() for batch in loader)


def decode(jpeg: bytes | memoryview) -> Image.Image:
    """Decode an RGB JPEG."""
    image = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
    image.load()
    return image


@dataclass(frozen=True)
class _Reader:
    """What a worker does with a batch's indices."""

    images: EncodedImages
    seed: int
    min_crop_area: float

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        index = np.asarray(index)
        if self.min_crop_area == 1:
            return self.images[index]
        return self.images.cropped(index, self.seed, self.min_crop_area)
