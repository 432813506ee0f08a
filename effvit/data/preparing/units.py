"""Encoded images to what is stored of them: so few at a time that every process has work from the start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from effvit.data.loading.views import evaluation_view
from effvit.data.preparing.duplicates import DIGEST_BYTES, digest
from effvit.data.preparing.tally import Tally
from effvit.data.sources.base import Originals
from effvit.data.sources.images import pillow_silenced, read_jpeg, read_square
from effvit.errors import UserError

UNIT_ROWS = 32
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rows:
    """What is stored of a unit: the images that are whole, in order, each a JPEG or all of them as pixels.

    ``count`` images were read, with the damaged ones.
    """

    stored: list[bytes]
    tally: Tally
    count: int


@dataclass(frozen=True)
class Unit:
    """Consecutive images, of which the first is row ``first`` of its part.

    ``in_mean`` are those that mean and standard deviation are of.
    """

    originals: Originals
    first: int
    size: int
    storage: str
    in_mean: np.ndarray

    def read(self, on_image: Callable[[], None]) -> Rows:
        """Read the images; ``on_image`` is called before each. Damaged ones are counted and left out."""
        tally = Tally()
        with pillow_silenced():
            stored = (self._jpegs if self.storage == "jpeg" else self._pixels)(tally, on_image)
        return Rows(stored, tally, len(self.in_mean))

    def _pixels(self, tally: Tally, on_image: Callable[[], None]) -> list[bytes]:
        kept, uncounted = [], []
        for index, in_mean in enumerate(self.in_mean):
            on_image()
            if read := self._read(index, read_square, tally):
                image, done = read
                if done:
                    tally.notes.update(done)
                kept.append(image)
                if not in_mean:
                    uncounted.append(image)
        strip = self._joined(kept)
        if self.in_mean.any():
            tally.count_levels(strip)
            tally.count_levels(self._joined(uncounted), -1)
        return [strip.tobytes()]

    def _jpegs(self, tally: Tally, on_image: Callable[[], None]) -> list[bytes]:
        stored = []
        for index, in_mean in enumerate(self.in_mean):
            on_image()
            if jpeg := self._read(index, read_jpeg, tally):
                tally.notes.update(jpeg.done)
                stored.append(jpeg.content)
                if in_mean:
                    tally.count_levels(evaluation_view(jpeg.image, self.size))
        return stored

    def _read(self, index: int, read: Callable[[bytes, str, int], _T], tally: Tally) -> _T | None:
        name, known = self.originals.name(index), bytes(DIGEST_BYTES)
        try:
            content = self.originals.read(index)
            known = digest(content)
            return read(content, name, self.size)
        except UserError as error:
            where = f"{self.originals.root / name}: "
            tally.damaged[self.first + index] = str(error).removeprefix(where).removeprefix(f"{name}: ")
            return None
        finally:
            tally.digests += known

    def _joined(self, images: list[Image.Image]) -> Image.Image:
        """Images one below the other: to copy and to count them at once takes a third of the time."""
        strip = Image.new("RGB", (self.size, self.size * len(images)))
        for number, image in enumerate(images):
            strip.paste(image, (0, number * self.size))
        return strip
