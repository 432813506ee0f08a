"""RandAugment for CUDA: the same launches whatever a batch's images drew, where each group would need its own.

An image takes one operation at a time, so a batch goes through all kinds of operations and each image keeps the result
of its own. There are three kinds: pixels move, levels change each by itself, or the image is blended with another.
What an operation does to every image alike is a table, made once by the operation itself on the CPU: so the pixels are
those of `effvit.data.loading.randaugment`. Rounding is the same as well, where a table cannot hold it.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit.data.loading.randaugment import LARGEST, OPERATIONS, VARIANTS

_LEVELS = 256
_MOST_VALUES = 2**24  # of pixels at once, which take 45 times as many bytes meanwhile
_MOVING = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_POINTWISE = ("Brightness", "Posterize", "Solarize")
_OF_THE_IMAGE = ("AutoContrast", "Equalize", "Color", "Sharpness")
_BLENDS = ("Color", "Contrast", "Sharpness")


class Tables(NamedTuple):
    """What each of the V variants does to images of H x W pixels, where it does the same to all of them."""

    sources: Tensor  # (V, 1, H W) int64: which pixel moves here
    inside: Tensor  # (V, 1, H W) uint8: 1, and 0 where none does: that is black
    values: Tensor  # (V, 1, 256) uint8: what becomes of a level
    blended: Tensor  # (V, 1, H W) bool: pixels that are blended
    own: Tensor  # (V, 1, 1) float32: share of the image itself in a blend
    others: Tensor  # (V, 1, 1) float64, as products are exact there: share of the other image, rounded to float32
    does: Tensor  # (V, 4, 1, 1) bool: which of `_OF_THE_IMAGE` it is


@functools.lru_cache(maxsize=4)
def tables(height: int, width: int, magnitude: int, device: torch.device) -> Tables:
    """Make the tables, and keep them on the device."""
    with torch.inference_mode(False):
        pixels = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
        levels = torch.arange(_LEVELS, dtype=torch.uint8).expand(1, 3, 1, -1)
        rows = []
        for number, (operation, sign) in enumerate(VARIANTS):
            name, strength = list(OPERATIONS)[number // 2], sign * magnitude / LARGEST
            moved = operation(pixels, strength) if name in _MOVING else pixels
            where = moved.reshape(1, -1).round().long() - 1  # -1 for black
            values = operation(levels, strength)[0, 0] if name in _POINTWISE else levels[0, 0]
            blended = torch.zeros(1, 1, height, width) if name in _BLENDS else pixels
            if name == "Sharpness":  # which leaves the border as it is
                blended = F.pad(blended[..., 1:-1, 1:-1], (1, 1, 1, 1), value=1)[..., :height, :width]
            # Of a sharpened image, the other is its difference from the mean of its neighbours.
            share = torch.tensor([1 + 0.9 * strength], dtype=torch.float64)
            own = torch.ones(1) if name == "Sharpness" else share.float()
            does = torch.tensor([name == each for each in _OF_THE_IMAGE])
            row = Tables(
                where.clamp(min=0),
                (where >= 0).to(torch.uint8),
                values,
                blended.reshape(1, -1) == 0,
                own[:, None],
                (1 - share).float().double()[:, None],
                does[:, None, None],
            )
            rows.append(row)
        return Tables(*(torch.stack(column).to(device) for column in zip(*rows, strict=True)))


@functools.lru_cache(maxsize=4)
def stretched(device: torch.device) -> Tensor:
    """What AutoContrast makes of each level, where a channel has levels from i to j: ``(256, 256, 256)``, uint8."""
    with torch.inference_mode(False):
        level = torch.arange(_LEVELS, dtype=torch.float32)
        least, most = level.view(-1, 1, 1), level.view(-1, 1)
        scale = (most - least).mul_(1 / (_LEVELS - 1))
        spread = (level - least).div(torch.where(scale == 0, 1, scale)).clamp_(0, _LEVELS - 1)
        return torch.where(scale == 0, level, spread).to(torch.uint8).to(device)


def by_tables(images: Tensor, choices: Tensor, magnitude: int) -> Tensor:
    """Apply to each image of uint8 ``(B, 3, H, W)``, one after another, what ``choices`` ``(rounds, B)`` number.

    As `effvit.data.loading.randaugment.randaugment`, with ``choices`` on the images' device.
    """
    of_variants = tables(*images.shape[-2:], magnitude, images.device)
    at_once = max(1, _MOST_VALUES // images[0].numel()) if len(images) else 1
    parts = []
    for part, numbers in zip(images.split(at_once), choices.split(at_once, dim=1), strict=True):
        chosen = Tables(*(table[numbers] for table in of_variants))
        for of_images in zip(*(table.unbind() for table in chosen), strict=True):
            part = _round(part, Tables(*of_images))
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _round(images: Tensor, chosen: Tables) -> Tensor:
    """One operation each; ``chosen`` has a row of the tables for each image."""
    automatic, equalized, coloured, sharpened = chosen.does.unbind(1)  # (B, 1, 1)
    flat = images.flatten(2)  # (B, 3, H W)
    levels = flat.sort(dim=2).values
    table, possible = _equalizing(levels)
    values = torch.where(equalized & possible, table, chosen.values)
    values = torch.where(automatic, stretched(images.device)[levels[..., 0].long(), levels[..., -1].long()], values)
    moved = flat.gather(2, chosen.sources.expand_as(flat)).mul_(chosen.inside)
    result = values.gather(2, moved.long())

    pixels = flat.float()
    grey = _grey(flat)
    mean = grey.sum(dim=2, keepdim=True).div_(grey.shape[2])  # a sum of whole numbers is exact in any order
    other = torch.where(coloured, grey, mean)
    other = torch.where(sharpened, _blurred(pixels.view_as(images)).flatten(2).sub_(pixels), other)
    # Rounded twice, as a multiplication and a fused addition are.
    mixed = pixels.mul_(chosen.own).addcmul_(other, chosen.others).clamp_(0, _LEVELS - 1)
    return torch.where(chosen.blended, mixed.to(torch.uint8), result).view_as(images)


def _grey(flat: Tensor) -> Tensor:
    """Whole grey levels ``(B, 1, H W)`` as floats, as torchvision's blends take them."""
    red, green, blue = flat.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blurred(pixels: Tensor) -> Tensor:
    """Whole means of each pixel, five times, and its eight neighbours: ``(B, 3, H, W)``, and 0 beyond the border."""
    return F.avg_pool2d(pixels, 3, stride=1, padding=1, divisor_override=1).add_(pixels, alpha=4).div_(13).round_()


def _equalizing(levels: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes of each level ``(B, 3, 256)`` where all shall be equally frequent, and where that is possible.

    Pillow's scheme, as torchvision has it. ``levels`` ``(B, 3, H W)`` are in order, so that the number of those below
    another is where it would stand: no histogram is needed, which CUDA adds up by sorting too if it shall be exact.
    """
    every = torch.arange(_LEVELS, dtype=torch.uint8, device=levels.device).expand(*levels.shape[:2], -1)
    below = torch.searchsorted(levels, every.contiguous())
    step = torch.searchsorted(levels, levels[..., -1:].contiguous()).div_(_LEVELS - 1, rounding_mode="floor")
    table = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=_LEVELS - 1)
    return table.to(torch.uint8), step > 0
