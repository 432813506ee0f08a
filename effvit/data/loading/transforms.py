"""Augmentation and normalisation of whole batches, as pure functions: chance has been drawn before they are called.

Shapes: B images of H x W pixels in C channels, K classes. Decisions of chance have one entry an image.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Box = tuple[int, int, int, int]  # top, left, height, width


def to_float(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 ``(B, H, W, C)`` to contiguous float32 ``(B, C, H, W)``; mean, std per channel, scale 0 to 1."""
    factor, shift = _normalisation(tuple(mean), tuple(std), images.device)
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # (B, C, H, W)
    return planes.mul_(factor).sub_(shift)


@functools.lru_cache(maxsize=8)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and shift by channel ``(C, 1, 1)``, kept on the device: to bring them there blocks the host."""
    with torch.inference_mode(False):  # or they could be used in no other mode
        offset, scale = (torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))
        return 1 / (255 * scale), offset / scale


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad each image with ``padding`` black pixels a side and cut it out again at its own ``top`` and ``left``.

    Shape in and out ``(B, H, W, C)``; offsets ``(B,)`` from 0 to ``2 * padding``.
    """
    _, height, width, channels = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    # All crops of an image as a view, rows of pixels flattened so that a crop is copied row by row: (B, P, P, H, W * C)
    crops = padded.flatten(2).unfold(1, height, 1).unfold(2, width * channels, channels)
    chosen = crops[torch.arange(len(images), device=images.device), top.to(images.device), left.to(images.device)]
    return chosen.reshape(images.shape)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left to right those images of ``(B, H, W, C)`` that ``flipped`` ``(B,)`` says."""
    return torch.where(flipped.to(images.device).view(-1, 1, 1, 1), images.flip(2), images)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each normalised image ``(B, C, H, W)`` to 0, the mean of all images.

    ``boxes`` ``(4, B)`` has top, left, height and width; a box of height 0 erases nothing.
    """
    top, left, height, width = boxes.to(images.device)[:, :, None]  # each (B, 1)
    row, column = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    rows = (row >= top) & (row < top + height)  # (B, H)
    columns = (column >= left) & (column < left + width)  # (B, W)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def mixup(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Blend each image with its neighbour: ``share`` of its own, ``1 - share`` of the other's.

    Zhang et al. 2018 (arXiv 1710.09412, section 2). Images 0 and 1, 2 and 3, ... are neighbours, and a last one
    without neighbour stays as it is: so a batch can be cut between pairs without changing what is mixed.

    Args:
        images: ``(B, C, H, W)``.
        targets: probabilities ``(B, K)``.
        share: from 0 to 1.
    """
    other = _neighbours(images)
    return images.mul(share).add_(images[other], alpha=1 - share), targets.mul(share).add_(
        targets[other], alpha=1 - share
    )


def cutmix(images: Tensor, targets: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Paste a box of its neighbour into each image; targets are blended in proportion to area.

    Yun et al. 2019 (arXiv 1905.04899, section 3.1). Arguments and neighbours as for `mixup`.
    """
    other = _neighbours(images)
    top, left, height, width = box
    pasted = images.clone()
    inside = (..., slice(top, top + height), slice(left, left + width))
    pasted[inside] = images[inside][other]
    share = 1 - height * width / (images.shape[-2] * images.shape[-1])
    return pasted, targets.mul(share).add_(targets[other], alpha=1 - share)


def _neighbours(images: Tensor) -> Tensor:
    order = torch.arange(len(images), device=images.device)
    return (order ^ 1).clamp(max=len(images) - 1)
