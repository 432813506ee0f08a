"""Augmentation and normalisation of a whole batch of uint8 images ``(B, H, W, C)``; chance comes from a generator.

The generator may live on another device than the images: offsets are drawn where it is, so that a CPU generator gives
the same augmentation on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def to_float(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 ``(B, H, W, C)`` to contiguous float32 ``(B, C, H, W)``; mean, std per channel, scale 0 to 1."""
    offset, scale = (torch.tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # (B, C, H, W)
    return planes.mul_(1 / (255 * scale)).sub_(offset / scale)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad each image with ``padding`` black pixels a side and cut it out again at an offset of its own.

    Shape in and out ``(B, H, W, C)``; each of the ``(2 * padding + 1) ** 2`` offsets is equally likely.
    """
    batch, height, width, channels = images.shape
    padded = functional.pad(images, (0, 0, padding, padding, padding, padding))
    # All crops of an image as a view, rows of pixels flattened so that a crop is copied row by row: (B, P, P, H, W * C)
    crops = padded.flatten(2).unfold(1, height, 1).unfold(2, width * channels, channels)
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=generator.device)
    chosen = crops[torch.arange(batch, device=images.device), top.to(images.device), left.to(images.device)]
    return chosen.reshape(images.shape)


def random_horizontal_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of ``(B, H, W, C)`` left to right with probability one half."""
    flipped = torch.rand(len(images), generator=generator, device=generator.device).lt(0.5).to(images.device)
    result = images.clone()
    result[flipped] = images[flipped].flip(2)
    return result
