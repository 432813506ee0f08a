"""From an encoded image to RGB: decoded by content, upright, as pixels of one size or as a JPEG of a moderate size."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from effvit.data.loading.encoded import decode
from effvit.data.loading.views import cut_strip, evaluation_view, resize_shorter, shorter_side
from effvit.data.sources.reading import raise_systems
from effvit.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
FORMATS_TEXT = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
SUFFIXES = {f".{name.lower()}": name for name in FORMATS} | {".jpg": "JPEG", ".tif": "TIFF"}
SUFFIXES |= dict.fromkeys((".pbm", ".pgm", ".pnm"), "PPM")
_OPENED = tuple(name for name in FORMATS if name != "AVIF" or find_spec("PIL.AvifImagePlugin"))  # since Pillow 11.3
_RECOGNISED = tuple(name for name in _OPENED if name != "TIFF")  # cameras' raw files begin like a TIFF, too
_KINDS = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "P": "palette", "PA": "palette", "RGBA": "transparent"}
_ORIENTATION = 0x0112  # Exif
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUALITY = 90
_LARGEST_LEVEL = 65535


def load_image(path: Path, size: int, storage: str = "pixels") -> np.ndarray:
    """Read an image file as evaluation sees those of a prepared data set: uint8 RGB ``(size, size, 3)``.

    Raises `UserError` when it is not a whole image.
    """
    content, name = path.read_bytes(), str(path)
    with pillow_silenced():
        if storage == "jpeg":
            return np.asarray(evaluation_view(decode(read_jpeg(content, name, size).content), size))
        return np.asarray(read_square(content, name, size)[0])


@contextmanager
def pillow_silenced() -> Iterator[None]:
    """Have Pillow say nothing of files that it finds odd: they are read, or an error names them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def read_square(content: bytes, name: str, size: int) -> tuple[Image.Image, list[str]]:
    """Decode an image to RGB, ``size`` pixels square, and say what was done to it, for instance ``["resized"]``.

    Raises `UserError`, which names it by ``name``, when it is not a whole image.
    """
    file = _read(content, name, size)
    if file.size != (size, size):
        file.done.append("resized")
    return _square(file.image, size), file.done


@dataclass(frozen=True)
class Jpeg:
    """An image as a JPEG: its bytes, the RGB pixels before they were compressed, and what was done to it."""

    content: bytes
    image: Image.Image
    done: list[str]


def read_jpeg(content: bytes, name: str, size: int) -> Jpeg:
    """Decode an image as an RGB JPEG for views of ``size`` pixels.

    The shorter side is reduced to `shorter_side`; a JPEG that is no larger stays as it is, byte by byte. Of what is
    encoded anew and longer than `cut_strip` leaves it, the ends go.

    Raises `UserError`, which names it by ``name``, when it is not a whole image.
    """
    side = shorter_side(size)
    file = _read(content, name, side)
    image = file.image
    if min(file.size) > side:
        file.done.append("reduced")
        image = resize_shorter(cut_strip(image), side)
    elif file.ready:
        return Jpeg(content, image, file.done)
    else:
        image = cut_strip(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return Jpeg(buffer.getvalue(), image, file.done)


def is_image(name: str, open_file: Callable[[], IO[bytes]]) -> bool:
    """Whether a file is meant as an image: by its suffix, else by how it begins."""
    if _suffix(name) in SUFFIXES:
        return True
    try:
        with open_file() as file, pillow_silenced():
            Image.open(file, formats=_RECOGNISED).close()
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        return True
    except Exception as error:  # it begins like one, and reading it will tell what is wrong with it
        raise_systems(error)
        with open_file() as file:
            mark = file.read(8)
        # The marks of BMP and PPM begin many a text. AVIF's is also that of HEIC.
        return not (mark[:2] == b"BM" or mark[:1] == b"P" or mark[4:] == b"ftyp")
    return True


@dataclass
class _File:
    """An image, decoded: RGB and upright, its full size, what was done, whether the file itself is such a JPEG."""

    image: Image.Image
    size: tuple[int, int]
    done: list[str]
    ready: bool


class _Unusable(Exception):
    """A whole image, but not one that can be shown in 8 bits per channel."""


def _read(content: bytes, name: str, side: int) -> _File:
    """Decode an image whose shorter side is to be ``side``; a JPEG comes reduced, to no less than twice that."""
    try:
        opened = Image.open(io.BytesIO(content), formats=_OPENED)
        size = opened.size
        if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError
        if min(size) >= 4 * side:
            opened.draft(None, (2 * side, 2 * side))
        opened.load()
        done = _note_kind(opened, content, name)
        turn = _turn(opened, done)
        ready = turn is None and opened.format == "JPEG" and opened.mode == "RGB"
        image = opened if turn is None else opened.transpose(turn)
        if image.mode != "RGB":
            done.append(f"{_kind(image.mode)} converted to RGB")
            image = _to_rgb(image)
        return _File(image, size, done, ready)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        raise_systems(error)
        raise UserError(f"{name}: {_reason(error, content)}") from error


def _note_kind(image: Image.Image, content: bytes, name: str) -> list[str]:
    kind, done = str(image.format), []
    if kind in FORMATS:
        if SUFFIXES.get(_suffix(name), kind) != kind:
            done.append(f"{kind} under the suffix of another format")
        if _has_more_frames(image, content):
            done.append("first of several frames taken")
    return done


def _has_more_frames(image: Image.Image, content: bytes) -> bool:
    if image.format != "GIF":
        return getattr(image, "is_animated", False)
    try:  # to look for a second frame Pillow gives up the first one, and that second one may be damaged
        return getattr(Image.open(io.BytesIO(content), formats=("GIF",)), "is_animated", False)
    except Exception as error:
        raise_systems(error)
        return True


def _turn(image: Image.Image, done: list[str]) -> Image.Transpose | None:
    """What makes an image upright, by its Exif or XMP, which are no part of the picture: damaged ones are ignored."""
    try:
        exif = image.getexif()
        if not exif and "exif" in image.info:  # of a JPEG, Pillow may have met what is wrong before, and kept silent
            Image.Exif().load(image.info["exif"])
        return _TURNS.get(exif.get(_ORIENTATION, 1))
    except Exception as error:  # anything, as in decoders
        raise_systems(error)
        done.append("unreadable Exif ignored")
        return None


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower()


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` pixels and crop the centre: uint8 ``(size, size)`` or ``(size, size, 3)``."""
    return np.asarray(_square(image, size))


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise _Unusable("pixels that are floating-point numbers, of unknown range")
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion may clip instead of scale
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > _LARGEST_LEVEL:
            raise _Unusable("pixels of more than 16 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    if image.mode == "P":  # a palette may hold transparency, which Pillow warns of when converted directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def _kind(mode: str) -> str:
    return "grayscale" if mode.startswith("I") else _KINDS.get(mode, mode)


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, _Unusable):
        return f"{error}; convert it to 8 bits per channel"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down or remove it"
    if not isinstance(error, UnidentifiedImageError):
        return f"damaged image ({error}); replace or remove it"
    if content[4:12] in (b"ftypavif", b"ftypavis") and not _reads_avif():
        return f"AVIF, which Pillow {PIL.__version__} cannot read here; install Pillow 11.3 or later, or convert it"
    if content[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF of a kind that Pillow cannot read; convert it to 8 bits per channel"
    return f"not an image (expected {FORMATS_TEXT})"


def _reads_avif() -> bool:
    if "AVIF" not in _OPENED:
        return False
    from PIL import AvifImagePlugin

    return AvifImagePlugin.SUPPORTED
