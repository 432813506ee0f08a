"""The batches of one epoch as the model takes them, for one of the processes that share the work.

Order and augmentation belong to the global batch and to (seed, epoch, step) alone, so that neither where an epoch is
entered nor the number of processes changes what the model sees.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from effvit.data.loading.ahead import ahead
from effvit.data.loading.augmentation import Augmentation, Draws, augment, draw
from effvit.data.loading.prepared import PreparedDataset
from effvit.data.loading.resident import resident
from effvit.seeding import Purpose, derive, numpy_generator

T = TypeVar("T")
_ALIGNED = 16  # bytes: where a tensor of any dtype may begin


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
    decoding = {"seed": derive(seed, Purpose.DECODING, epoch), "min_crop_area": augmentation.min_crop_area}
    shares = _shares(
        dataset, "train", np.split(order, range(batch_size, count, batch_size))[start:], place, workers, **decoding
    )

    def made() -> Iterator[tuple[Parcel, Draws, int]]:
        for step, (found, part, total) in enumerate(shares, start):
            rng = numpy_generator(seed, Purpose.AUGMENTATION, epoch, step)
            draws = draw(rng, total, dataset.image_size, augmentation).share(part)
            yield Parcel.of([*found, *draws.tensors().values()], place.device), draws, total

    kept = resident(dataset, "train", place.device)
    for parcel, draws, total in _in_time(made(), place.device):
        arrived = parcel.sent(place.device)
        chance = draws.tensors()
        drawn: dict[str, Any] = dict(zip(chance, arrived[len(arrived) - len(chance) :], strict=True))
        images, labels = arrived[:2] if kept is None else kept.at(arrived[0])
        yield Batch(*augment(images, labels, replace(draws, **drawn), augmentation, dataset), total)


def validation_batches(dataset: PreparedDataset, place: Place, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Shares of the validation part's batches, unchanged."""
    count = dataset.counts["validation"]
    batches = np.split(np.arange(count), range(batch_size, count, batch_size))
    shares = _shares(dataset, "validation", batches, place, workers, seed=0)
    made = ((Parcel.of(found, place.device), total) for found, _, total in shares)
    kept = resident(dataset, "validation", place.device)
    for parcel, total in _in_time(made, place.device):
        arrived = parcel.sent(place.device)
        images, labels = arrived if kept is None else kept.at(arrived[0])
        yield Batch(*augment(images, labels, Draws(), Augmentation(), dataset), total)


def _in_time(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """What is made on the host for a device: where it is another processor, while that is busy with the one before."""
    return items if device.type == "cpu" else ahead(items)


def _shares(
    dataset: PreparedDataset,
    split: str,
    batches: list[np.ndarray],
    place: Place,
    workers: int,
    **chance: Any,
) -> Iterator[tuple[list[Tensor], slice, int]]:
    """Images and labels, or the numbers of images that are `resident`; their part of the batch, and its size."""
    images, labels = dataset.split(split)
    parts = [place.share(len(batch)) for batch in batches]
    rows = [batch[part] for batch, part in zip(batches, parts, strict=True)]
    if resident(dataset, split, place.device) is not None:
        for batch, part, index in zip(batches, parts, rows, strict=True):
            yield [torch.from_numpy(index)], part, len(batch)
        return
    loaded = images.batches(rows, workers=workers, **chance)
    for batch, part, index, array in zip(batches, parts, rows, loaded, strict=True):
        yield [torch.from_numpy(array), torch.from_numpy(labels[index])], part, len(batch)


@dataclass(frozen=True)
class Parcel:
    """Tensors of the CPU on their way to a device: to CUDA in one copy from pinned memory, for which no one waits."""

    tensors: Sequence[Tensor]
    packed: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], device: torch.device) -> "Parcel":
        """Make tensors ready to be sent."""
        return cls(tensors, pack(tensors, pinned=True) if device.type == "cuda" else None)

    def sent(self, device: torch.device) -> list[Tensor]:
        """The tensors on the device."""
        if self.packed is None:
            return [tensor.to(device) for tensor in self.tensors]
        return unpack(self.packed.to(device, non_blocking=True), self.tensors)


def pack(tensors: Sequence[Tensor], *, pinned: bool = False) -> Tensor:
    """Copy tensors into one of bytes, each where any dtype may begin; ``pinned``: where a GPU reads it by itself."""
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    packed = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, pin_memory=pinned)
    for part, start in zip(flat, _starts(tensors), strict=False):
        packed[start : start + len(part)] = part
    return packed


def unpack(packed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack` made of ``tensors``, whose dtypes and shapes they have."""
    parts = (packed[start : start + each.nbytes] for start, each in zip(_starts(tensors), tensors, strict=False))
    return [part.view(each.dtype).view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins, and where all of them end."""
    return [0, *accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors)]
