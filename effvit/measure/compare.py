"""A mechanism's cost compared with ``fused``, with running out of memory or time as results."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from effvit.errors import UserError
from effvit.measure.alone import Load
from effvit.measure.latency import Call, interleaved, paired_interval, paired_ratio, stopwatch_for, summarise
from effvit.measure.memory import peak_bytes
from effvit.memory import is_out_of_memory

OK, OUT_OF_MEMORY, OVER_BUDGET = "ok", "out of memory", "over budget"
LONGEST_CALL = 4  # times the sampling budget: longer calls would give too few samples for too much time
MIN_ROUNDS = 6  # the fewest of which a median has a 95 % interval without assumptions
_MOST_ATTEMPTS = 6
Samples = NDArray[np.float64]
Convert = Callable[[Samples], Samples]
Row = dict[str, object]
MakeCall = Callable[[], Call]
"""Allocates what a call needs, so that memory running out there is a result as well."""


@dataclass(frozen=True)
class Comparison:
    """Samples of a mechanism and of ``fused``; None where there are none, ``status`` then says why for the former."""

    status: str
    samples: Samples | None = None
    fused: Samples | None = None

    @classmethod
    def single(cls, value: int | None, fused: int | None) -> "Comparison":
        """One exact sample each; None is out of memory."""
        if value is None:
            return cls(OUT_OF_MEMORY)
        return cls(OK, np.array([value], float), None if fused is None else np.array([fused], float))

    def map(self, convert: Convert, convert_fused: Convert | None = None) -> "Comparison":
        """Convert every sample, into another unit say."""
        return Comparison(
            self.status,
            None if self.samples is None else convert(self.samples),
            None if self.fused is None else (convert_fused or convert)(self.fused),
        )

    def row(self) -> Row:
        """Columns ``median, q25, q75, p90, n, fused_median, ratio_to_fused, ratio_low, ratio_high, status``.

        ``ratio_low`` and ``ratio_high`` are the ends of the ratio's 95 % interval. None where not measured, and where
        a single round gives no interval.
        """
        row: Row = dict.fromkeys(("median", "q25", "q75", "p90", "n", "fused_median", "ratio_to_fused"))
        row |= dict.fromkeys(("ratio_low", "ratio_high"))
        if self.samples is not None:
            row |= summarise(self.samples)
            if self.fused is not None:
                row["fused_median"] = float(np.median(self.fused))
                row["ratio_to_fused"] = paired_ratio(self.samples, self.fused)
                row["ratio_low"], row["ratio_high"] = paired_interval(self.samples, self.fused) or (None, None)
        return row | {"status": self.status}


def compare_seconds(
    make: MakeCall, fused: MakeCall | None, *, budget_s: float, device: torch.device, min_rounds: int = MIN_ROUNDS
) -> Comparison:
    """Seconds of both calls, interleaved for ``budget_s``, and for ``min_rounds`` whatever they take.

    A call that takes more than ``LONGEST_CALL`` times that is over budget.
    """
    status, call = try_out(make, LONGEST_CALL * budget_s, device)
    if call is None:
        return Comparison(status)
    calls = {"this": call}
    if fused is not None and (fused_call := try_out(fused, LONGEST_CALL * budget_s, device)[1]) is not None:
        calls["fused"] = fused_call
    samples = interleaved(calls, budget_s=budget_s, device=device, min_rounds=min_rounds)
    return Comparison(OK, samples["this"], samples.get("fused"))


def compare_peaks(make: MakeCall, fused: MakeCall | None, *, device: torch.device) -> Comparison:
    """Peak bytes of one call each; exact, hence a single sample."""
    return Comparison.single(peak_or_none(make, device), None if fused is None else peak_or_none(fused, device))


def peak_or_none(make: MakeCall, device: torch.device) -> int | None:
    """Peak bytes of a call; None where memory runs out."""
    try:
        return peak_bytes(make(), device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def try_out(make: MakeCall, limit_s: float, device: torch.device) -> tuple[str, Call | None]:
    """Make a call and run it: a status, and the call where it is ``OK``, that is, takes no more than ``limit_s``."""
    try:
        call = make()
        return (OK, call) if _in_time(call, limit_s, device) else (OVER_BUDGET, None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY, None


def _in_time(call: Call, limit_s: float, device: torch.device) -> bool:
    """Whether a call takes no longer; a first one that does may have loaded code, a later one waited for others."""
    for attempt in range(_MOST_ATTEMPTS):
        meanwhile = Load(device)
        if stopwatch_for(device)(call, 1) <= limit_s:
            return True
        if attempt and not meanwhile.contended():
            break
    return False


_MOST = {"batch_size": 2**31 - 1, "tokens_per_batch": 2**31 - 1, "threads": 1024}


def require_positive(**values: float | None) -> None:
    """Raise ``UserError`` naming the first value that is not a finite number above 0, or absurd; None passes."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name}={value}: must be a number above 0")
        if value is not None and value > (most := _MOST.get(name, math.inf)):
            raise UserError(f"{name}={value}: must be at most {most}")
