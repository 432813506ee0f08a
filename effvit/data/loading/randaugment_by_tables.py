"""RandAugment for CUDA: the same launches whatever a batch's images drew, where each group would need its own.

An image takes one operation at a time, so a batch goes through all kinds of operations and each image keeps the result
of its own. What an operation does to every image alike is a table, made once by the operation itself on the CPU: so
the pixels are those of `effvit.data.loading.randaugment`. Rounding is the same as well, where a table cannot hold it.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from effvit.data.loading.randaugment import LARGEST, OPERATIONS, VARIANTS

_LEVELS = 256
_NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}
_MOVING = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_POINTWISE = ("Brightness", "Posterize", "Solarize")


class Tables(NamedTuple):
    """What each of the V variants does to images of H x W pixels, where it does the same to all of them."""

    sources: Tensor  # (V, H W) int64: which pixel moves here; H W is black
    values: Tensor  # (V, 256) uint8: what becomes of a level
    own: Tensor  # (V,) float32: share of the image itself in a blend
    others: Tensor  # (V,) float64: the rest, rounded to float32


@functools.lru_cache(maxsize=4)
def tables(height: int, width: int, magnitude: int, device: torch.device) -> Tables:
    """Make the tables, and keep them on the device."""
    with torch.inference_mode(False):
        pixels = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
        levels = torch.arange(_LEVELS, dtype=torch.uint8).expand(1, 3, 1, -1)
        sources, values, own = [], [], []
        for number, (operation, sign) in enumerate(VARIANTS):
            name, strength = list(OPERATIONS)[number // 2], sign * magnitude / LARGEST
            moved = operation(pixels, strength) if name in _MOVING else pixels
            sources.append(moved.flatten().round().long().sub(1))
            values.append(operation(levels, strength)[0, 0, 0] if name in _POINTWISE else levels[0, 0, 0])
            own.append(1 + 0.9 * strength)
        outside = height * width
        where = torch.stack(sources)
        shares = torch.tensor(own, dtype=torch.float64)
        return Tables(
            torch.where(where < 0, outside, where).to(device),
            torch.stack(values).to(device),
            shares.float().to(device),
            (1 - shares).float().double().to(device),
        )


def by_tables(images: Tensor, choices: Tensor, magnitude: int) -> Tensor:
    """Apply to each image of uint8 ``(B, 3, H, W)``, one after another, what ``choices`` ``(rounds, B)`` number.

    As `effvit.data.loading.randaugment.randaugment`, with ``choices`` on the images' device.
    """
    of_variants = tables(*images.shape[-2:], magnitude, images.device)
    for chosen in choices:
        images = _round(images, chosen, of_variants)
    return images


def _round(images: Tensor, chosen: Tensor, of_variants: Tables) -> Tensor:
    """One operation each: those whose tables are known beforehand, then those that depend on the image."""
    operations = (chosen // 2).view(-1, 1, 1)

    def does(name: str) -> Tensor:
        return operations == _NUMBERS[name]

    flat = images.flatten(2)  # (B, 3, H W)
    moved = torch.cat([flat, flat.new_zeros(1).expand(*flat.shape[:2], 1)], dim=2).gather(
        2, of_variants.sources[chosen][:, None].expand(-1, flat.shape[1], -1)
    )
    grey = _grey(flat)
    own, others = (shares[chosen].view(-1, 1, 1) for shares in (of_variants.own, of_variants.others))
    levels = torch.arange(_LEVELS, dtype=torch.uint8, device=images.device).expand(len(images), 1, -1)
    values = of_variants.values[chosen][:, None].expand(-1, flat.shape[1], -1)
    values = torch.where(does("AutoContrast"), _stretched(flat), values)
    values = torch.where(does("Contrast"), _blend(levels, grey.mean(dim=(1, 2), keepdim=True), own, others), values)
    result = values.gather(2, moved.long())
    result = torch.where(does("Color"), _blend(flat, grey, own, others), result)
    result = torch.where(does("Sharpness"), _sharpened(images, others).flatten(2), result)
    return torch.where(does("Equalize"), F.equalize(images).flatten(2), result).view_as(images)


def _grey(flat: Tensor) -> Tensor:
    """Whole grey levels ``(B, 1, H W)`` as floats, as torchvision's blends take them."""
    red, green, blue = flat.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blend(images: Tensor, other: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """``own`` of the images and ``others`` of another, rounded twice, as a multiplication and a fused addition are."""
    mixed = (images * own).double().addcmul(other.double(), others).float()
    return mixed.clamp_(0, _LEVELS - 1).to(torch.uint8)


def _stretched(flat: Tensor) -> Tensor:
    """What becomes of each level ``(B, 3, 256)`` where those of a channel are spread over all."""
    least, most = flat.amin(2, keepdim=True).float(), flat.amax(2, keepdim=True).float()
    scale = (most - least).mul_(1 / (_LEVELS - 1))
    level = torch.arange(_LEVELS, dtype=torch.float32, device=flat.device)
    stretched = (level - least).div_(torch.where(scale == 0, 1, scale)).clamp_(0, _LEVELS - 1)
    return torch.where(scale == 0, level, stretched).to(torch.uint8)


def _sharpened(images: Tensor, others: Tensor) -> Tensor:
    """All pixels but those of the border moved from the mean of their neighbours, or towards it."""
    height, width = images.shape[-2:]
    if height <= 2 or width <= 2:
        return images
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = (box + 4 * inner).div_(13).round_()
    inner.copy_(inner.double().addcmul((blurred - inner).double(), others[..., None]).float())
    return pixels.clamp_(0, _LEVELS - 1).to(torch.uint8)
