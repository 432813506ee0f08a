"""Time of several calls measured alternately, so that whatever disturbs the machine disturbs all of them alike."""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effvit.measure.memory import no_garbage_collection

Call = Callable[[], object]
Stopwatch = Callable[[Call, int], float]
"""Seconds that calling so many times in a row takes."""

_SHORTEST_SAMPLE_S = 1e-3  # below it the clock's own cost would show
_SETTLING_S, _IDLE_S = 0.3, 1.0  # that a GPU is busy until its clocks settle, and idle until they fall again
_WARM_UP_SHARE = 0.05
_MOST_WARM_UPS = 50


def interleaved(
    calls: Mapping[str, Call],
    *,
    budget_s: float,
    device: torch.device,
    min_rounds: int = 3,
    max_rounds: int = 1000,
    relative_interval: float = 0.03,
    stopwatch: Stopwatch | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Measure every call once a round, in random order, until all medians are known well or time is up.

    Args:
        calls: what to measure, by name.
        budget_s: seconds for all rounds together; ``min_rounds`` are made whatever they take.
        device: where the calls run.
        min_rounds: fewest rounds.
        max_rounds: most rounds.
        relative_interval: width of the 95 % interval of a median, relative to it, that is well enough.
        stopwatch: measures in place of ``stopwatch_for(device)``.

    Returns:
        Seconds of one call, by name: one sample a round, so that sample i of two calls was taken in the same round.
        A call shorter than a millisecond is repeated within its sample, which is then a mean.
    """
    measure = stopwatch or stopwatch_for(device)
    names = list(calls)
    if device.type == "cuda":
        _settle(list(calls.values()), measure)
    repeats = {name: _warm_up(calls[name], measure, budget_s) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0
    order = random.Random(0)  # a fixed or rotating order has each call run on the caches that the same other one leaves
    with no_garbage_collection():
        for done in range(1, max_rounds + 1):
            order.shuffle(names)
            for name in names:
                seconds = measure(calls[name], repeats[name])
                samples[name].append(seconds / repeats[name])
                spent += seconds
            if done >= min_rounds and (
                spent >= budget_s or all(median_interval(s) <= relative_interval for s in samples.values())
            ):
                break
    _last_busy[0] = time.monotonic()
    return {name: np.array(samples[name]) for name in calls}


_last_busy = [-math.inf]  # when the last measurement ended


def _settle(calls: Sequence[Call], measure: Stopwatch) -> None:
    """Keep a GPU busy that was idle until its clocks are those of one that works."""
    if time.monotonic() - _last_busy[0] > _IDLE_S:
        for call in calls:  # which may compile or load
            measure(call, 1)
        spent = 0.0
        while spent < _SETTLING_S:
            spent += sum(measure(call, 1) for call in calls)


def median_interval(samples: list[float]) -> float:
    """Width of the 95 % interval of the median, relative to the median; infinite for fewer than six samples.

    The interval lies between two order statistics, hence needs no assumption about how times are distributed.
    """
    from scipy.special import bdtr  # SciPy is slow to import, and processes that only run calls need no interval

    n = len(samples)
    outside = int(np.count_nonzero(bdtr(np.arange(n), n, 0.5) <= 0.025))  # samples left out on either side
    if outside == 0:
        return float("inf")
    ordered = np.sort(samples)
    return float((ordered[n - outside] - ordered[outside - 1]) / np.median(ordered))


def summarise(samples: NDArray[np.float64]) -> dict[str, float]:
    """Median, quartiles, 90th percentile and number of samples, in the samples' own unit."""
    q25, median, q75, p90 = (float(q) for q in np.quantile(samples, [0.25, 0.5, 0.75, 0.9]))
    return {"median": median, "q25": q25, "q75": q75, "p90": p90, "n": len(samples)}


def paired_ratio(samples: NDArray[np.float64], baseline: NDArray[np.float64]) -> float:
    """Median over rounds of each round's ratio: what slows a whole round down cancels."""
    return float(np.median(samples / baseline))


def paired_interval(samples: NDArray[np.float64], baseline: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of ``paired_ratio``; None for a single round.

    From six rounds on it lies between two order statistics, hence needs no assumption about how ratios are distributed;
    fewer have no such interval, and the one given is Student's t of their logarithms.
    """
    from scipy import stats  # see above

    ratios = samples / baseline
    interval: Any = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    if np.isfinite([interval.low, interval.high]).all():
        return float(interval.low), float(interval.high)
    if len(ratios) < 2:
        return None
    interval = stats.ttest_1samp(np.log(ratios), 0.0).confidence_interval(0.95)
    return float(np.exp(interval.low)), float(np.exp(interval.high))


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return the device's own clock: CUDA events on CUDA, the performance counter on CPU."""
    if device.type != "cuda":
        return _cpu_seconds

    def cuda_seconds(call: Call, repeats: int) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3

    return cuda_seconds


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) / 1e9


def _warm_up(call: Call, measure: Stopwatch, budget_s: float) -> int:
    """Call until a share of the budget is spent; return how many calls make a sample long enough."""
    spent = 0.0
    for _ in range(_MOST_WARM_UPS):
        seconds = measure(call, 1)
        spent += seconds
        if spent >= _WARM_UP_SHARE * budget_s:
            break
    return max(1, ceil(_SHORTEST_SAMPLE_S / seconds)) if seconds > 0 else 1
