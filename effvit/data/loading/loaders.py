"""DataLoaders of one's own in the place of a prepared data set."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from effvit.data.loading.batches import Batch, Place
from effvit.errors import UserError
from effvit.seeding import Purpose, derive


class Loaders:
    """Batches from a loader for training and perhaps one for validation, checked one by one.

    ``counts`` has the number of images that the last pass through each loader gave.

    Args:
        train: gives pairs of images ``(B, channels, H, W)``, normalised floats, and labels ``(B,)``, whole numbers.
        validation: likewise; None for none.
        num_classes: labels are from 0 to ``num_classes - 1``.

    Raises:
        UserError: a loader without a length, or with nothing in it.
    """

    def __init__(self, train: DataLoader[Any], validation: DataLoader[Any] | None, num_classes: int) -> None:
        self.train, self.validation, self.num_classes = train, validation, num_classes
        self.steps = length_of(train, "train")
        if validation is not None:
            length_of(validation, "validation")
        self.counts = {"train": 0, "validation": 0}

    def training_batches(self, place: Place, *, seed: int, epoch: int) -> Iterator[Batch]:
        """Batches of an epoch. A loader without a generator of its own gets its order from ``seed`` and ``epoch``."""
        torch.manual_seed(derive(seed, Purpose.ORDER, epoch))
        return self._pass("train", self.train, place)

    def validation_batches(self, place: Place) -> Iterator[Batch]:
        """Batches for validation, none where there is no such loader."""
        return iter(()) if self.validation is None else self._pass("validation", self.validation, place)

    def _pass(self, name: str, loader: DataLoader[Any], place: Place) -> Iterator[Batch]:
        images_given = steps = 0
        for images, labels in islice(checked_batches(loader, name, self.num_classes), len(loader)):
            images_given, steps = images_given + len(images), steps + 1
            images = images.to(place.device, torch.float32, non_blocking=True)  # which it is where a loader pins memory
            yield Batch(images, labels.to(place.device, non_blocking=True), len(images))
        if steps < len(loader):
            raise UserError(f"{name}: the loader gave {steps} batches, its length is {len(loader)}")
        self.counts[name] = images_given


def length_of(loader: Any, name: str) -> int:
    """Number of batches of a loader; raises ``UserError`` where it does not know, or has none."""
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a loader over a data set without a length
        length = None
    if length is None:
        raise UserError(
            f"{name}: got {type(loader).__name__}, which has no length; expected a prepared data set or a DataLoader"
        )
    if not length:
        raise UserError(f"{name}: the loader has no batches")
    return length


def checked_batches(loader: Any, name: str, num_classes: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a loader's images ``(B, channels, H, W)`` and labels, int64 ``(B,)``.

    Args:
        loader: gives pairs of tensors.
        name: what messages call it.
        num_classes: labels are below it; None to leave that open.

    Raises:
        UserError: a batch that is something else.
    """
    if not isinstance(loader, Iterable):
        raise UserError(f"{name}: got {type(loader).__name__}, expected a prepared data set or a DataLoader")
    for step, batch in enumerate(loader, 1):
        where = f"{name}: batch {step}"
        if not (isinstance(batch, list | tuple) and [isinstance(part, Tensor) for part in batch] == [True, True]):
            raise UserError(f"{where} is {_described(batch)}, expected a pair of tensors, images and labels")
        images, labels = batch
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(
                f"{where} has images {_described(images)}, expected normalised floats (batch, channels, height, width)"
            )
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.shape != images.shape[:1] or not whole:
            raise UserError(f"{where} has labels {_described(labels)}, expected int64 ({len(images)},)")
        if not len(images):
            raise UserError(f"{where} has no images")
        least, largest = int(labels.min()), int(labels.max())
        if least < 0 or (num_classes is not None and largest >= num_classes):
            wrong = least if least < 0 else largest
            upper = "" if num_classes is None else f" to {num_classes - 1}, the model's classes"
            raise UserError(f"{where} has label {wrong}, expected labels from 0{upper}")
        yield images, labels.long()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return f"of type {type(value).__name__}"
