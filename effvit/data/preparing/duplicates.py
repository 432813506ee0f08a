"""Byte-identical images in two parts, which make a score too good, or in two classes, one of which is wrong."""

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effvit.data.loading.prepared import SPLITS

DIGEST_BYTES = 16


def digest(image: bytes) -> bytes:
    """Bytes that only byte-identical images share."""
    return hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Stored:
    """What tells the images of one stored part apart.

    ``digests`` are uint8 ``(n, 16)``, zero for an image that could not be read; ``parts`` and ``labels`` are ``(n,)``:
    the split that each image is in, as an index into ``SPLITS``, and its class. ``name`` names an image by its row.
    """

    digests: np.ndarray
    parts: np.ndarray
    labels: np.ndarray
    name: Callable[[int], str]


def write_duplicates(path: Path, stored: Mapping[str, Stored], classes: Sequence[str]) -> dict[str, Counter[str]]:
    """Write images that are in two parts or two classes to ``path``, one a row, the same ones together.

    Columns are group, part, class and file. Without such images there is no file.

    Returns:
        For each stored part, how many of its images are also in another part, and in another class.
    """
    notes: dict[str, Counter[str]] = {name: Counter() for name in stored}
    names = list(stored)
    lengths = [len(stored[name].labels) for name in names]
    where = np.repeat(np.arange(len(names)), lengths)
    rows = np.concatenate([np.arange(length) for length in lengths])
    parts = np.concatenate([stored[name].parts for name in names])
    labels = np.concatenate([stored[name].labels for name in names])
    table: list[tuple[int, str, str, str]] = []
    for group in _groups(np.concatenate([stored[name].digests for name in names])):
        several = {
            "byte-identical to an image of another part": len(set(parts[group])) > 1,
            "byte-identical to an image of another class": len(set(labels[group])) > 1,
        }
        if not any(several.values()):
            continue
        number = table[-1][0] + 1 if table else 0
        for image in group:
            name = names[where[image]]
            notes[name].update(what for what, is_so in several.items() if is_so)
            table.append((number, SPLITS[parts[image]], classes[labels[image]], stored[name].name(int(rows[image]))))
    if table:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["group", "part", "class", "file"])
            writer.writerows(table)
    return notes


def _groups(digests: np.ndarray) -> list[np.ndarray]:
    """Indices of equal rows of uint8 ``(n, 16)``, where there are several, in the order of the first."""
    halves = np.ascontiguousarray(digests).view(np.uint64)  # (n, 2)
    order = np.lexsort(halves.T)
    starts = np.flatnonzero(np.append(True, (halves[order][1:] != halves[order][:-1]).any(axis=1)))
    stops = np.append(starts[1:], len(order))
    groups = [np.sort(order[slice(*run)]) for run in np.stack([starts, stops], axis=1)[stops - starts > 1]]
    return sorted((group for group in groups if halves[group[0]].any()), key=lambda group: int(group[0]))
