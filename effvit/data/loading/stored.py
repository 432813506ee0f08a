"""Images of a split as training and evaluation see them, however they are stored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


class Images(ABC):
    """The images of one split: index them like a uint8 array ``(n, S, S, 3)``; they are read when indexed."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(n, S, S, 3)``."""

    @abstractmethod
    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """The images as evaluation sees them, uint8: ``(S, S, 3)`` for a number, else ``(b, S, S, 3)``."""

    @abstractmethod
    def batches(
        self, rows: Sequence[np.ndarray], *, seed: int, workers: int, min_crop_area: float = 1.0
    ) -> Iterator[np.ndarray]:
        """Yield uint8 ``(b, S, S, 3)`` for each array of indices in ``rows``, in that order.

        What an image looks like depends on ``seed`` and on which image it is, not on its batch, the order or the
        number of workers.

        Args:
            rows: indices into this split, an array a batch.
            seed: of the random crops.
            workers: processes that read ahead; 0 reads in this one.
            min_crop_area: least share of an image's area that a random crop keeps; 1 gives the view of evaluation.
        """


@dataclass(frozen=True)
class PixelImages(Images):
    """Chosen rows of a memory-mapped array of pixels. They come at their size, so that ``batches`` crops nothing."""

    array: np.ndarray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.array.shape[1:])

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        return self.array[self.rows[index]]

    def batches(
        self, rows: Sequence[np.ndarray], *, seed: int, workers: int, min_crop_area: float = 1.0
    ) -> Iterator[np.ndarray]:
        return (self[batch] for batch in rows)
