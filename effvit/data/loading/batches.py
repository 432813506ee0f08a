"""The batches of one epoch as the model takes them, for one of the processes that share the work.

Order and augmentation belong to the global batch and to (seed, epoch, step) alone, so that neither where an epoch is
entered nor the number of processes changes what the model sees.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effvit.data.loading.augmentation import Augmentation, Draws, augment, draw
from effvit.data.loading.prepared import PreparedDataset
from effvit.seeding import Purpose, derive, numpy_generator


@dataclass(frozen=True)
class Place:
    """Where a process stands: its device, and its rank among the ``world`` processes that share each batch."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def share(self, count: int) -> slice:
        """Return this process's part of ``count`` images, possibly none; pairs of neighbours stay together."""
        pairs = -(-count // 2)
        start, stop = (2 * (pairs * rank // self.world) for rank in (self.rank, self.rank + 1))
        return slice(min(start, count), min(stop, count))


@dataclass(frozen=True)
class Batch:
    """A share of a batch of ``total`` images: ``(b, 3, S, S)``, and targets as `augment` gives them."""

    images: Tensor
    targets: Tensor
    total: int


def steps_of(count: int, batch_size: int) -> int:
    """Batches of ``batch_size`` that hold ``count`` images; the last may be smaller."""
    return math.ceil(count / batch_size)


def training_batches(
    dataset: PreparedDataset,
    augmentation: Augmentation,
    place: Place,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Shares of the batches of an epoch's steps from ``start``: every training image once an epoch, in random order."""
    count = dataset.counts["train"]
    order = numpy_generator(seed, Purpose.ORDER, epoch).permutation(count)
    chance = {"seed": derive(seed, Purpose.DECODING, epoch), "min_crop_area": augmentation.min_crop_area}
    shares = _shares(
        dataset, "train", np.split(order, range(batch_size, count, batch_size))[start:], place, workers, **chance
    )
    for step, (images, labels, part, total) in enumerate(shares, start):
        rng = numpy_generator(seed, Purpose.AUGMENTATION, epoch, step)
        draws = draw(rng, total, dataset.image_size, augmentation)
        yield Batch(*augment(images, labels, draws.share(part), augmentation, dataset), total)


def validation_batches(dataset: PreparedDataset, place: Place, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Shares of the validation part's batches, unchanged."""
    count = dataset.counts["validation"]
    batches = np.split(np.arange(count), range(batch_size, count, batch_size))
    for images, labels, _, total in _shares(dataset, "validation", batches, place, workers, seed=0):
        yield Batch(*augment(images, labels, Draws(), Augmentation(), dataset), total)


def _shares(
    dataset: PreparedDataset,
    split: str,
    batches: list[np.ndarray],
    place: Place,
    workers: int,
    **chance: Any,
) -> Iterator[tuple[Tensor, Tensor, slice, int]]:
    """Images and labels on the device, the part of the batch that they are, and the size of the batch."""
    images, labels = dataset.split(split)
    parts = [place.share(len(batch)) for batch in batches]
    rows = [batch[part] for batch, part in zip(batches, parts, strict=True)]
    loaded = images.batches(rows, workers=workers, **chance)
    for batch, part, index, array in zip(batches, parts, rows, loaded, strict=True):
        yield _to(array, place.device), _to(labels[index], place.device), part, len(batch)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
