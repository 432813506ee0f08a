"""Differences of accuracy to a baseline: over seeds, and between two trained models on the same test images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies (fractions), its 95 % interval and the p-value of none; NaN where unknown."""

    difference: float
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")


def over_seeds(values: ArrayLike, baseline: ArrayLike) -> Difference:
    """Mean of the differences of paired seeds, with the interval and the two-sided p-value of Student's t.

    Args:
        values: `(n,)` accuracies, one a seed.
        baseline: `(n,)` accuracies of the baseline at the same seeds.

    Returns:
        The difference alone for a single seed, and where it is the same at all seeds: nothing tells their spread then.
    """
    a, b = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    mean = float((a - b).mean())
    if len(a) < 2 or np.ptp(a - b) <= 1e-12:
        return Difference(mean)
    test: Any = stats.ttest_rel(a, b)
    interval = test.confidence_interval(LEVEL)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def between_models(right: ArrayLike, baseline_right: ArrayLike) -> Difference:
    """Difference of two models' accuracies on the same images, with McNemar's exact test (McNemar 1947).

    Only the images count that exactly one model gets right. Their share that goes to the first model is a binomial
    proportion, one half if neither is better; its exact interval (Clopper and Pearson 1934), scaled to a difference of
    accuracies, is the interval here, so that it excludes 0 exactly where p is below 5 %. It speaks of these two trained
    models, not of how they were made.

    Args:
        right: `(n,)` booleans, whether the model has each image right.
        baseline_right: `(n,)` booleans of the other model, same images.
    """
    a, b = np.asarray(right, dtype=bool), np.asarray(baseline_right, dtype=bool)
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    if not gained + lost:
        return Difference(0.0, 0.0, 0.0, 1.0)
    test = stats.binomtest(gained, gained + lost)
    interval = test.proportion_ci(LEVEL, method="exact")
    low, high = ((2 * end - 1) * (gained + lost) / len(a) for end in (interval.low, interval.high))
    return Difference((gained - lost) / len(a), float(low), float(high), float(test.pvalue))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """P-values adjusted so that all comparisons together err with the probability of one (Holm 1979); NaN stays."""
    values = np.asarray(p, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors)) if len(order) else []
    return adjusted
