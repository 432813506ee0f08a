"""From an image file to an RGB array: decoded by content, upright, resized, centre-cropped."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from effvit.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_KINDS = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "P": "palette", "PA": "palette", "RGBA": "transparent"}


def load_image(path: Path, size: int) -> np.ndarray:
    """Read an image file as uint8 RGB ``(size, size, 3)``; raises `UserError` when it is not a whole image."""
    return read_image(path, size)[0]


def read_image(path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """Read an image file as `load_image` does, and say what had to be done to it, for instance ``["resized"]``."""
    try:
        image = _open(path)
        done = []
        if image.mode != "RGB":
            done.append(f"{_kind(image.mode)} converted to RGB")
            image = _to_rgb(image)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise UserError(f"{path}: {_reason(error)}") from error
    if image.size != (size, size):
        done.append("resized")
    return fit(image, size), done


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` pixels and crop the centre: uint8 ``(size, size)`` or ``(size, size, 3)``."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image)


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion may clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # a palette may hold transparency, which Pillow warns of when converted directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def _kind(mode: str) -> str:
    return "grayscale" if mode.startswith("I") else _KINDS.get(mode, mode)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]})"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down or remove it"
    return f"damaged image ({error}); replace or remove it"
