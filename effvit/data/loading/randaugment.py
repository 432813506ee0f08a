"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of a batch, each image with operations of its own.

Operations and strengths are those of torchvision's ``v2.RandAugment``, which does the same to all images of a batch.
Here images with the same operation are taken together, so that a batch costs a few calls and not some for each image.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

LARGEST = 30  # magnitudes are 0 to 30, as in torchvision's 31 bins


def _shear(images: Tensor, x: float, y: float) -> Tensor:
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0])


def _shift(images: Tensor, x: float, y: float) -> Tensor:
    height, width = images.shape[-2:]
    return F.affine(images, angle=0.0, translate=[int(x * width), int(y * height)], scale=1.0, shear=[0.0, 0.0])


# Each takes uint8 images (B, C, H, W) and a strength from -1 to 1, of which some mind the sign and some do not.
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda images, s: images,
    "ShearX": lambda images, s: _shear(images, 0.3 * s, 0),
    "ShearY": lambda images, s: _shear(images, 0, 0.3 * s),
    "TranslateX": lambda images, s: _shift(images, 150 / 331 * s, 0),
    "TranslateY": lambda images, s: _shift(images, 0, 150 / 331 * s),
    "Rotate": lambda images, s: F.rotate(images, 30 * s),
    "Brightness": lambda images, s: F.adjust_brightness(images, 1 + 0.9 * s),
    "Color": lambda images, s: F.adjust_saturation(images, 1 + 0.9 * s),
    "Contrast": lambda images, s: F.adjust_contrast(images, 1 + 0.9 * s),
    "Sharpness": lambda images, s: F.adjust_sharpness(images, 1 + 0.9 * s),
    "Posterize": lambda images, s: F.posterize(images, 8 - round(4 * abs(s))),
    "Solarize": lambda images, s: F.solarize(images, 255 * (1 - abs(s))),
    "AutoContrast": lambda images, s: F.autocontrast(images),
    "Equalize": lambda images, s: F.equalize(images),
}
VARIANTS = [(operation, sign) for operation in OPERATIONS.values() for sign in (1, -1)]


def randaugment(images: Tensor, choices: Tensor, magnitude: int) -> Tensor:
    """Apply to each image of uint8 ``(B, C, H, W)``, one after another, what ``choices`` ``(rounds, B)`` number.

    They are indices of ``VARIANTS``; ``magnitude`` is from 1 to ``LARGEST``.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for chosen in choices:
        for number in chosen.unique().tolist():
            operation, sign = VARIANTS[number]
            rows = (chosen == number).nonzero().squeeze(1).to(images.device)
            images[rows] = operation(images[rows], sign * magnitude / LARGEST)
    return images
