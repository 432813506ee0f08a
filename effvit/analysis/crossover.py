"""From which sequence length a mechanism pays off, and how its cost grows."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def efficiency_length(tokens: ArrayLike, cost: ArrayLike, baseline: ArrayLike) -> float | None:
    """Smallest token count from which `cost` stays below `baseline` up to the last measured one.

    Between two measured points both costs are taken as straight lines in log-log scale. An infinite cost stands for a
    run that was stopped (out of memory, over the time budget); nothing is interpolated towards it, the next measured
    point counts.

    Args:
        tokens: `(n,)` increasing, positive token counts.
        cost: `(n,)` positive costs of the mechanism, any unit.
        baseline: `(n,)` positive costs of the baseline, same unit.

    Returns:
        The token count; the first measured one if `cost` is below `baseline` everywhere; None if it is not below
        at the last.

    Raises:
        ValueError: not three vectors of one length, tokens not increasing, a NaN or a number that is not positive.
    """
    n, c, b = _checked(tokens, cost, baseline)
    above = np.flatnonzero(c >= b)
    if above.size == 0:
        return float(n[0])
    i = above[-1]
    if i == n.size - 1:
        return None
    if not np.isfinite([c[i], b[i], c[i + 1], b[i + 1]]).all():
        return float(n[i + 1])
    before, after = np.log(c[i] / b[i]), np.log(c[i + 1] / b[i + 1])  # >= 0 and < 0
    return float(np.exp(np.interp(0.0, [after, before], np.log([n[i + 1], n[i]]))))


def slope_interval(tokens: ArrayLike, cost: ArrayLike) -> tuple[float, float | None, float | None]:
    """Exponent p of the least-squares fit `log cost = a + p log tokens`, and its 95 % interval by Student's t.

    1 is linear growth, 2 quadratic. The interval is that of the points about the line: it covers the noise of
    each point and the curvature between them alike.

    Args:
        tokens: `(n,)` increasing, positive token counts, at least two.
        cost: `(n,)` positive, finite costs.

    Returns:
        Slope and the ends of its interval; None for the ends where two points leave nothing to judge by.

    Raises:
        ValueError: fewer than two points, or vectors as `efficiency_length` refuses them.
    """
    from scipy import stats  # slow to import, and figures and the page need no slope

    n, c = _checked(tokens, cost)
    if n.size < 2 or not np.isfinite(c).all():
        raise ValueError("a slope needs at least two finite points")
    fit = stats.linregress(np.log(n), np.log(c))
    if n.size == 2:
        return float(fit.slope), None, None
    half = stats.t.ppf(0.975, n.size - 2) * np.nan_to_num(fit.stderr)  # not a number where the cost is constant
    return float(fit.slope), float(fit.slope - half), float(fit.slope + half)


def _checked(*vectors: ArrayLike) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(vector, dtype=float) for vector in vectors]
    if arrays[0].ndim != 1 or arrays[0].size == 0 or any(a.shape != arrays[0].shape for a in arrays):
        raise ValueError(f"expected vectors of one length, not shapes {[a.shape for a in arrays]}")
    if not all((a > 0).all() for a in arrays):
        raise ValueError("token counts and costs must be positive numbers")
    if not np.isfinite(arrays[0]).all() or not (np.diff(arrays[0]) > 0).all():
        raise ValueError("token counts must increase")
    return arrays
