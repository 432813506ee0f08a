"""Predicting what more tokens will cost, so that what cannot be afforded is never tried."""

from dataclasses import dataclass, field

import numpy as np

from effvit.measure.compare import LONGEST_CALL, OK, OUT_OF_MEMORY, OVER_BUDGET, Samples
from effvit.measure.memory import MIB


def predict(points: list[tuple[int, float]], tokens: int) -> float:
    """Cost at ``tokens`` from costs at fewer tokens, on the curve a·N² + b·N (a, b ≥ 0) through the last two points.

    Attention grows no faster than N². One point is taken as all quadratic, the worst case; without points nothing
    is known and the answer is 0.
    """
    if not points:
        return 0.0
    n1, cost1 = points[-1]
    if len(points) == 1:
        return cost1 * (tokens / n1) ** 2
    n0, cost0 = points[-2]
    a = max(0.0, (cost1 / n1 - cost0 / n0) / (n1 - n0))
    b = max(0.0, cost1 / n1 - a * n1)
    return a * tokens**2 + b * tokens


_OVERHEAD = 32  # a call of one sample may be nearly all overhead: in a batch samples took down to 1/22 of its time


@dataclass
class Budget:
    """MiB of one call and seconds of sampling at a point, what smaller calls took, and what that has led to so far.

    What calls took is kept for one sample of their batch: the batch has as many times that. `one_sample` is the budget
    of the same calls on one sample, by which the first batch of several is judged.
    """

    memory_mib: float
    sampling_s: float
    status: str = OK
    peaks: list[tuple[int, float]] = field(default_factory=list)
    times: list[tuple[int, float]] = field(default_factory=list)
    one_sample: "Budget | None" = None

    def foresee(self, tokens: int, batch_size: int = 1) -> str:
        """Whether a call on such a batch can be afforded; once one cannot, none of more tokens can.

        Memory is judged from one point on, as trying too much of it can end the process. Time is judged from two:
        a single short call is mostly overhead, and calling it quadratic would refuse what was never tried. For the
        same reason a first batch is over budget only if it would be at `1 / _OVERHEAD` of the time of its samples.
        """
        if (one := self.one_sample) is not None and not (self.peaks or self.times):
            self.stop(one.status)
            peak, seconds = predict(one.peaks, tokens), predict(one.times, tokens)
            self._judge(batch_size * peak, batch_size * seconds / _OVERHEAD)
        seconds = predict(self.times, tokens) if len(self.times) > 1 else 0.0
        self._judge(batch_size * predict(self.peaks, tokens), batch_size * seconds)
        return self.status

    def learn(self, tokens: int, batch_size: int, peak: Samples | None, seconds: Samples | None) -> None:
        """Take in what a call took, None where it was not measured."""
        if peak is not None:
            self.peaks.append((tokens, float(peak[0]) / batch_size))
            self._judge(float(peak[0]), 0.0)
        if seconds is not None:
            self.times.append((tokens, float(np.median(seconds)) / batch_size))

    def stop(self, status: str) -> None:
        """Try nothing larger, for the reason ``status``."""
        if self.status == OK:
            self.status = status

    def _judge(self, peak: float, seconds: float) -> None:
        if peak > self.memory_mib * MIB:
            self.stop(OUT_OF_MEMORY)
        if seconds > LONGEST_CALL * self.sampling_s:
            self.stop(OVER_BUDGET)
