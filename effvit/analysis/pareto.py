"""The mechanisms worth considering: those that no other one beats in both cost and value."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(cost: ArrayLike, value: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other point dominates; lower cost and higher value are better.

    A point dominates another if it is no worse in both and better in one. Equal points do not dominate each other, so
    duplicates are on the front together; of points with equal cost only the best value is, and the other way round.

    Args:
        cost: `(n,)` numbers, any unit.
        value: `(n,)` numbers, any unit.

    Returns:
        `(n,)` booleans, true on the front.

    Raises:
        ValueError: not two vectors of one length, or a NaN among them.
    """
    c, v = np.asarray(cost, dtype=float), np.asarray(value, dtype=float)
    if c.ndim != 1 or c.shape != v.shape:
        raise ValueError(f"cost and value must be vectors of one length, not of shapes {c.shape} and {v.shape}")
    if np.isnan(c).any() or np.isnan(v).any():
        raise ValueError("cost and value must not contain NaN")
    front = np.zeros(c.shape, dtype=bool)
    last = None  # the newest point of the front; sorted so, it alone decides whether the next point belongs to it
    for i in np.lexsort((-v, c)):
        if last is None or v[i] > v[last] or (v[i] == v[last] and c[i] == c[last]):
            front[i], last = True, i
    return front
