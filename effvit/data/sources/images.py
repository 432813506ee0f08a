"""From an image file to RGB: decoded by content, upright, as pixels of one size or as a JPEG of a moderate size."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from effvit.data.loading.encoded import decode
from effvit.data.loading.views import cut_strip, evaluation_view, resize_shorter, shorter_side
from effvit.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
FORMATS_TEXT = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
_KINDS = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "P": "palette", "PA": "palette", "RGBA": "transparent"}
_ORIENTATION, _UPRIGHT = 0x0112, 1  # Exif
_QUALITY = 90


def load_image(path: Path, size: int, storage: str = "pixels") -> np.ndarray:
    """Read an image file as evaluation sees those of a prepared data set: uint8 RGB ``(size, size, 3)``.

    Raises `UserError` when it is not a whole image.
    """
    if storage == "jpeg":
        return np.asarray(evaluation_view(decode(read_jpeg(path.read_bytes(), path, size)[0]), size))
    return read_image(path.read_bytes(), path, size)[0]


def read_image(content: bytes, path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """Decode an image as uint8 RGB ``(size, size, 3)``, and say what was done to it, for instance ``["resized"]``.

    Raises `UserError`, which names it by ``path``, when it is not a whole image.
    """
    file = _read(content, path)
    if file.image.size != (size, size):
        file.done.append("resized")
    return fit(file.image, size), file.done


def read_jpeg(content: bytes, path: Path, size: int) -> tuple[bytes, list[str]]:
    """Decode an image as an RGB JPEG for views of ``size`` pixels, and say what was done to it.

    The shorter side is reduced to `shorter_side`; a JPEG that is no larger stays as it is, byte by byte. Of what is
    encoded anew and longer than `cut_strip` leaves it, the ends go.

    Raises `UserError`, which names it by ``path``, when it is not a whole image.
    """
    file = _read(content, path)
    side = shorter_side(size)
    if min(file.image.size) > side:
        file.done.append("reduced")
        file.image = resize_shorter(cut_strip(file.image), side)
    elif file.ready:
        return content, file.done
    else:
        file.image = cut_strip(file.image)
    buffer = io.BytesIO()
    file.image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), file.done


def is_image(name: str, open_file: Callable[[], IO[bytes]]) -> bool:
    """Whether a file is meant as an image: by its suffix, else by how it begins."""
    if Path(name).suffix.lower() in SUFFIXES:
        return True
    try:
        with open_file() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(file, formats=FORMATS).close()
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        return True
    except Exception as error:  # it begins like one, and reading it will tell what is wrong with it
        _raise_systems(error)
        with open_file() as file:
            return file.read(2) != b"BM"  # two letters are a BMP's whole mark, and begin many a text
    return True


@dataclass
class _File:
    """An image file, read: RGB and upright, what was done to that end, whether the file itself is such a JPEG."""

    image: Image.Image
    done: list[str]
    ready: bool


def _read(content: bytes, path: Path) -> _File:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
        kind = str(image.format)
        ready = kind == "JPEG" and image.mode == "RGB" and image.getexif().get(_ORIENTATION, _UPRIGHT) == _UPRIGHT
        done = []
        if SUFFIXES.get(path.suffix.lower(), kind) != kind and kind in FORMATS:
            done.append(f"{kind} under the suffix of another format")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "RGB":
            done.append(f"{_kind(image.mode)} converted to RGB")
            return _File(_to_rgb(image), done, ready)
        return _File(image, done, ready)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        _raise_systems(error)
        raise UserError(f"{path}: {_reason(error)}") from error


def _raise_systems(error: Exception) -> None:
    """Raise what is not the file's fault."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        raise error


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` pixels and crop the centre: uint8 ``(size, size)`` or ``(size, size, 3)``."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image)


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
        return f"not an image (expected {FORMATS_TEXT})"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down or remove it"
    return f"damaged image ({error}); replace or remove it"
