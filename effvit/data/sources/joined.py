"""Several lots of original images as one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from effvit.data.sources.base import Files, Originals


def join_originals(lots: Sequence[Originals]) -> Originals:
    """The images of all lots, one lot after another."""
    lots = [lot for lot in lots if len(lot)] or list(lots[:1])
    if len(lots) == 1:
        return lots[0]
    if all(isinstance(lot, Files) and lot.root == lots[0].root for lot in lots):
        return Files(lots[0].root, tuple(lot.name(index) for lot in lots for index in range(len(lot))))
    return Joined(tuple(lots))


@dataclass(frozen=True)
class Joined:
    """Lots of images, one after another."""

    lots: tuple[Originals, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(lot) for lot in self.lots])

    @cached_property
    def root(self) -> Path:
        return Path(os.path.commonpath([lot.root for lot in self.lots]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Originals, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        lot = self.lots[number]
        return lot, index - int(self._ends[number]) + len(lot)

    def name(self, index: int) -> str:
        lot, row = self._find(index)
        return (lot.root / lot.name(row)).relative_to(self.root).as_posix()

    def read(self, index: int) -> bytes:
        lot, row = self._find(index)
        return lot.read(row)

    def take(self, rows: np.ndarray) -> Originals:
        numbers = np.searchsorted(self._ends, rows, side="right")
        runs = np.split(rows, np.flatnonzero(np.diff(numbers)) + 1)
        taken = []
        for run in filter(len, runs):
            lot, first = self._find(int(run[0]))
            taken.append(lot.take(run - int(run[0]) + first))
        return join_originals(taken) if taken else self.lots[0].take(rows)

    def stamp(self) -> list[Any]:
        return [lot.stamp() for lot in self.lots]
