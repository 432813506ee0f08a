"""A split that stays on a GPU, where a batch is then a list of numbers."""

from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.loading.stored import PixelImages

_SHARE = 0.1  # of a GPU's memory
_AT_ONCE = 4096  # images on the way there


@dataclass(frozen=True)
class Resident:
    """Images ``(n, S, S, 3)``, uint8, and labels ``(n,)`` of a split, on a device."""

    images: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of these numbers ``(b,)``."""
        return self.images[rows], self.labels[rows]


# As long as the data set is in use.
_kept: WeakKeyDictionary[PreparedDataset, dict[tuple[str, torch.device], Resident]] = WeakKeyDictionary()


def resident(dataset: PreparedDataset, split: str, device: torch.device) -> Resident | None:
    """Return a split as it is kept on a GPU: where it is stored as pixels that take no more than a tenth of its memory.

    It is moved there when it is asked for first.
    """
    images, labels = dataset.split(split)
    if not isinstance(images, PixelImages) or prod(images.shape) > _room(device):
        return None
    kept = _kept.setdefault(dataset, {})
    if (split, device) not in kept:
        there = torch.empty(images.shape, dtype=torch.uint8, device=device)
        for first in range(0, len(images), _AT_ONCE):
            there[first : first + _AT_ONCE] = torch.from_numpy(images[first : first + _AT_ONCE])
        kept[split, device] = Resident(there, torch.from_numpy(labels).to(device))
    return kept[split, device]


def _room(device: torch.device) -> int:
    """Bytes that a split may take."""
    return int(_SHARE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
