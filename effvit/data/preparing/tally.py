"""What was counted while images were read."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Tally:
    """What was done to images, and how often each level occurs in each channel of some of them: int64 ``(3, 256)``.

    ``damaged`` says by row what is wrong with those that could not be read. ``digests`` are 16 bytes per image, which
    only byte-identical ones share, in the order of the rows; zeros for an image of which nothing could be read.
    """

    notes: Counter[str] = field(default_factory=Counter)
    levels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    damaged: dict[int, str] = field(default_factory=dict)
    digests: bytearray = field(default_factory=bytearray)

    def add(self, other: "Tally") -> None:
        """Add what was counted of the rows that follow."""
        self.notes.update(other.notes)
        self.levels += other.levels
        self.damaged.update(other.damaged)
        self.digests += other.digests

    def count_levels(self, image: Image.Image, times: int = 1) -> None:
        """Add the pixels of an RGB image, or take them away again: -1 times."""
        self.levels += times * np.array(image.histogram()).reshape(3, 256)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return {
            "notes": dict(self.notes),
            "levels": self.levels.tolist(),
            "damaged": list(self.damaged.items()),
            "digests": self.digests.hex(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Tally":
        """Read what `as_json` gave; anything else is a `KeyError`, `TypeError` or `ValueError`."""
        levels = np.array(value["levels"], dtype=np.int64).reshape(3, 256)
        damaged = {int(row): str(reason) for row, reason in value["damaged"]}
        return cls(Counter(value["notes"]), levels, damaged, bytearray.fromhex(value["digests"]))
