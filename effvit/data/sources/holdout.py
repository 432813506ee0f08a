"""The rule by which images are held out of a set: stratified, and the same whatever the seed."""

import numpy as np


def hold_out(labels: np.ndarray, every: float) -> tuple[np.ndarray, np.ndarray]:
    """Hold out one image in ``every`` of each class, evenly spaced through the class in stored order.

    Of a class with n images, ``m = max(1, round(n / every))`` (halves up) are held out: the ones at positions
    ``(2i + 1)n // 2m`` for i = 0 ... m - 1, so no random number is involved. A class of one image is a ValueError.

    Args:
        labels: integer labels ``(n,)``.
        every: at least 2; of a share of each class, one divided by it.

    Returns:
        Indices kept and indices held out, both int64 and ascending.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        n = len(members)
        if n < 2:
            raise ValueError(f"class {label} has a single image, at least 2 are needed")
        m = max(1, int((2 * n + every) // (2 * every)))
        held[members[(2 * np.arange(m) + 1) * n // (2 * m)]] = True
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)
