"""The view of a decoded image that a model sees: always the same for evaluation, cropped at random for training."""

import math

import numpy as np
from PIL import Image

_MARGIN = 8 / 7  # ImageNet's custom: 224 pixels of the centre of an image whose shorter side is 256
_LEAST_LOG_RATIO, _LARGEST_LOG_RATIO = math.log(3 / 4), math.log(4 / 3)
_ATTEMPTS = 10
_LARGEST_RATIO = 20  # of the sides: of a longer strip no view shows the ends, and enlarged it takes gigabytes


def shorter_side(size: int) -> int:
    """Pixels of the shorter side of an image before ``size`` pixels of its centre are cut out."""
    return round(size * _MARGIN)


def cut_strip(image: Image.Image) -> Image.Image:
    """Cut a strip down to its middle, 20 times as long as it is wide; other images stay unchanged."""
    longest = _LARGEST_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(length, longest) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """Resize to ``side`` pixels of the shorter side; the longer side keeps the ratio, rounded down."""
    shorter = min(image.size)
    if shorter == side:
        return image
    width, height = (int(side * length / shorter) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def evaluation_view(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `shorter_side`, cut out ``size`` pixels square of the centre."""
    image = resize_shorter(cut_strip(image), shorter_side(size))
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def random_view(image: Image.Image, size: int, min_area: float, rng: np.random.Generator) -> Image.Image:
    """Cut out a random rectangle and resize it to ``size`` pixels square.

    Szegedy et al. 2015 (arXiv 1409.4842, section 6), as torchvision's ``RandomResizedCrop`` draws it: area uniform in
    ``min_area`` to 1 of the image, ratio of the sides log-uniform in 3/4 to 4/3.
    """
    # Bilinear takes two thirds of bicubic's time, and the crop's size is random anyway.
    return image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(image.size, min_area, rng))


def random_box(shape: tuple[int, int], min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random rectangle in an image of ``shape`` (width, height)."""
    width, height = shape
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(_LEAST_LOG_RATIO, _LARGEST_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # the most that the ratios allow
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
