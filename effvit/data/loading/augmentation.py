"""What is done to training images: chance is drawn for the whole batch, then applied to any share of it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from effvit.data.loading.transforms import Box, crop, cutmix, erase, flip, mixup, to_float

if TYPE_CHECKING:
    from effvit.data.loading.prepared import Meta

_ROUNDS = 2  # operations of RandAugment for each image
# Zhong et al. 2017 (arXiv 1708.04896): the part of the image's area, and how many times one side may be the other.
_ERASED_AREA, _ERASED_RATIO = (0.02, 0.33), 3.3


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, as `docs/training.md` explains each; 0 and False are off.

    ``crop_padding`` is in pixels, ``min_crop_area`` a share of images stored larger than they are used,
    ``randaugment`` a magnitude, ``random_erasing`` a probability, ``mixup`` and ``cutmix`` the alpha of a Beta.
    """

    crop_padding: int = 0
    min_crop_area: float = 1.0
    horizontal_flip: bool = False
    randaugment: int = 0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass(frozen=True)
class Draws:
    """The chance of one batch of B images: tensors ``(..., B)``, and how the batch is mixed. None is off."""

    offsets: Tensor | None = None  # (2, B): top and left of the crop
    flipped: Tensor | None = None  # (B,)
    choices: Tensor | None = None  # (rounds, B): operations of RandAugment
    boxes: Tensor | None = None  # (4, B): what is erased, as `erase` takes it
    mixing: float | Box | None = None  # the share of `mixup`, or the box of `cutmix`

    def share(self, part: slice) -> "Draws":
        """Chance of a part of the batch's images."""
        parts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            parts[field.name] = value[..., part] if isinstance(value, Tensor) else value
        return Draws(**parts)

    def tensors(self) -> dict[str, Tensor]:
        """What there is of tensors, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def draw(rng: np.random.Generator, count: int, size: int, augmentation: Augmentation) -> Draws:
    """Draw the chance of a batch of ``count`` images of ``size`` pixels a side."""

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(limit, size=shape))

    return Draws(
        offsets=integers(2 * augmentation.crop_padding + 1, 2, count) if augmentation.crop_padding else None,
        flipped=integers(2, count).bool() if augmentation.horizontal_flip else None,
        choices=_draw_choices(rng, count) if augmentation.randaugment else None,
        boxes=_draw_boxes(rng, count, size, augmentation.random_erasing) if augmentation.random_erasing else None,
        mixing=_draw_mixing(rng, size, augmentation) if augmentation.mixup or augmentation.cutmix else None,
    )


def _draw_choices(rng: np.random.Generator, count: int) -> Tensor:
    from effvit.data.loading.randaugment import VARIANTS  # not above: torchvision takes seconds to import

    return torch.from_numpy(rng.integers(len(VARIANTS), size=(_ROUNDS, count)))


def _draw_boxes(rng: np.random.Generator, count: int, size: int, probability: float) -> Tensor:
    """Boxes of 2 to 33 % of the image and of ratio 1 / 3.3 to 3.3; a side longer than the image is cut to fit."""
    area = rng.uniform(*_ERASED_AREA, count)
    root = _ERASED_RATIO ** (rng.uniform(-1, 1, count) / 2)
    height, width = (np.clip(np.rint(size * np.sqrt(area) * side), 1, size).astype(int) for side in (root, 1 / root))
    top, left = (rng.integers(size - side + 1) for side in (height, width))
    return torch.from_numpy(np.stack([top, left, height * (rng.random(count) < probability), width]))


def _draw_mixing(rng: np.random.Generator, size: int, augmentation: Augmentation) -> float | Box:
    """Mixup or CutMix, equally likely where both are on, with a share from Beta(alpha, alpha)."""
    cut = rng.random() < 0.5 if augmentation.mixup and augmentation.cutmix else bool(augmentation.cutmix)
    alpha = augmentation.cutmix if cut else augmentation.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return share
    side = int(size * (1 - share) ** 0.5)
    (top, bottom), (left, right) = (
        np.clip([middle - side // 2, middle - side // 2 + side], 0, size).tolist()
        for middle in rng.integers(size, size=2)
    )
    return top, left, bottom - top, right - left


def augment(
    images: Tensor, labels: Tensor, draws: Draws, augmentation: Augmentation, meta: "Meta"
) -> tuple[Tensor, Tensor]:
    """Turn uint8 images into the model's input.

    Args:
        images: uint8 ``(B, H, W, 3)``.
        labels: int64 ``(B,)``.
        draws: chance for just these images.
        augmentation: what the draws were drawn for.
        meta: mean, std and classes of the data set.

    Returns:
        Normalised images ``(B, 3, H, W)``, and targets: the labels, or probabilities ``(B, K)`` where images are mixed.
    """
    if draws.offsets is not None:
        images = crop(images, augmentation.crop_padding, *draws.offsets)
    if draws.flipped is not None:
        images = flip(images, draws.flipped)
    if draws.choices is not None:
        form = _randaugment_for(images.device)
        images = form(images.permute(0, 3, 1, 2), draws.choices, augmentation.randaugment).permute(0, 2, 3, 1)
    inputs = to_float(images, meta.mean, meta.std)
    if draws.boxes is not None:
        inputs = erase(inputs, draws.boxes)
    if draws.mixing is None:
        return inputs, labels
    targets = functional.one_hot(labels, len(meta.classes)).float()
    if isinstance(draws.mixing, float):
        return mixup(inputs, targets, draws.mixing)
    return cutmix(inputs, targets, draws.mixing)


def _randaugment_for(device: torch.device) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The form of RandAugment that suits a device. Not imported above: torchvision takes seconds."""
    if device.type == "cuda":
        from effvit.data.loading.randaugment_by_tables import by_tables

        return by_tables
    from effvit.data.loading.randaugment import randaugment

    return randaugment
