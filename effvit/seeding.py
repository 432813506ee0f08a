"""Chance without a state: each generator is made anew from the run's seed, what it is for, and where the run stands.

So a run that is continued needs no generator's state, and processes that share the work draw the same numbers.
"""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for; no two uses share a stream."""

    ORDER = 0
    AUGMENTATION = 1
    DECODING = 2
    DROPOUT = 3
    REDRAW = 4


def derive(seed: int, purpose: Purpose, *where: int) -> int:
    """Return a seed of 64 bits that belongs to this purpose at this place alone (NumPy's ``SeedSequence``)."""
    return int(np.random.SeedSequence((seed, purpose, *where)).generate_state(1, np.uint64)[0])


def numpy_generator(seed: int, purpose: Purpose, *where: int) -> np.random.Generator:
    """Return NumPy's generator for this purpose at this place."""
    return np.random.default_rng((seed, purpose, *where))


def torch_generator(seed: int, purpose: Purpose, *where: int) -> torch.Generator:
    """Return a CPU generator for this purpose at this place."""
    return torch.Generator().manual_seed(derive(seed, purpose, *where))
