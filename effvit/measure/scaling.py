"""Cost against the number of tokens, of a block or a model compared with ``fused``, up to a memory and time budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt

import torch

from effvit.measure.alone import Load
from effvit.measure.compare import (
    OK,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    Comparison,
    MakeCall,
    Row,
    compare_peaks,
    compare_seconds,
)
from effvit.measure.execution import EAGER, Execution, busy_share, launch_bound
from effvit.measure.growth import Budget
from effvit.measure.latency import Call
from effvit.measure.subject import MODES, Subject, fits

_MIN_ROUNDS = 3  # of the longest calls, which take most of the time
ONE, TOKENS = BATCHES = "one", "tokens"


def batch_sizes(tokens: int, tokens_per_batch: int) -> dict[str, int]:
    """Samples of each kind of batch: one sample, and about a fixed number of tokens if these are several samples."""
    size = tokens_per_batch // tokens
    return {ONE: 1} | ({TOKENS: size} if size > 1 else {})


def measure_scaling(
    subject: Subject,
    tokens: Sequence[int],
    *,
    tokens_per_batch: int,
    memory_mib: float,
    budget_s: float,
    device: torch.device,
    how: Execution = EAGER,
) -> Iterator[list[Row]]:
    """Measure time and peak memory of a forward and a training pass, from few tokens to many, one batch and another.

    A point is "out of memory" if it needs, or by the points before it would need, more than ``memory_mib`` above
    what is resident; it is "over budget" if a single call takes, or would take, ``LONGEST_CALL`` times
    ``budget_s``. Larger points are then not tried.

    Args:
        subject: the block or model.
        tokens: token counts, each 1 + n².
        tokens_per_batch: tokens that the larger batch has at most; it is left out where that is one sample.
        memory_mib: MiB that a pass may take.
        budget_s: seconds spent on sampling each point.
        device: cpu or cuda.
        how: precision, and whether it is compiled.

    Yields:
        For each token count, two rows (time and memory) of each mode and kind of batch: ``precision, execution, scope,
        hidden_size, batch, batch_size, tokens, mode, quantity, unit``, the columns of ``Comparison.row``, and of times
        ``other_load``, the share of the machine that other processes took meanwhile, and whether that makes the point
        ``contended``; and ``busy``, the share of the time in which a GPU computes, and whether so little of it that the
        point is ``launch_bound``. Times and bytes are those of one sample.
    """
    sides: dict[tuple[str, str], tuple[_Side, _Side]] = {}
    for mode in MODES:
        one = [_Side(s, mode, device, Budget(memory_mib, budget_s), how) for s in (subject, subject.baseline())]
        several = [replace(s, budget=Budget(memory_mib, budget_s, one_sample=s.budget)) for s in one]
        sides[ONE, mode], sides[TOKENS, mode] = (one[0], one[1]), (several[0], several[1])
    for count in with_probes(subject, tokens):
        rows: list[Row] = []
        for batch, size in batch_sizes(count, tokens_per_batch).items():
            for mode in MODES:
                points = _point(count, size, *sides[batch, mode])
                place = {"precision": how.precision, "execution": how.mode, "scope": subject.scope}
                rows += [place | {"hidden_size": subject.width, "batch": batch} | row for row in points]
        if count in tokens:
            yield rows


def with_probes(subject: Subject, tokens: Sequence[int]) -> list[int]:
    """Add token counts so that none has more than four times the patches of the one before, from 65 tokens on.

    From these the needs of larger ones are predicted before they are tried.
    """
    counts: list[int] = []
    for count in sorted(set(tokens)):
        side = isqrt(counts[-1] - 1) * 2 if counts else 8
        while 1 + side**2 < count:
            if fits(subject, 1 + side**2):
                counts.append(1 + side**2)
            side *= 2
        counts.append(count)
    return counts


@dataclass(frozen=True)
class _Side:
    subject: Subject
    mode: str
    device: torch.device
    budget: Budget
    how: Execution

    def make(self, tokens: int, batch_size: int) -> Call:
        return self.subject.call(self.mode, tokens, batch_size, self.device, self.how)


def _point(tokens: int, size: int, this: _Side, fused: _Side) -> list[Row]:
    time = memory = Comparison(this.budget.foresee(tokens, size))
    nothing: Row = {"other_load": None, "contended": False, "busy": None, "launch_bound": False}
    load = nothing
    if time.status == OK:
        make = partial(this.make, tokens, size)
        make_fused = partial(fused.make, tokens, size) if fused.budget.foresee(tokens, size) == OK else None
        # Time before memory, so that nothing is left which only a first call allocates.
        meanwhile = Load(this.device)
        budget = this.budget.sampling_s
        time = compare_seconds(make, make_fused, budget_s=budget, device=this.device, min_rounds=_MIN_ROUNDS)
        load = {"other_load": meanwhile.other_load(), "contended": meanwhile.contended()}
        busy = _busy(make if time.status == OK else None, make_fused, this.device)
        load |= {"busy": busy, "launch_bound": launch_bound(busy)}
        if time.status != OUT_OF_MEMORY:
            memory = compare_peaks(make, make_fused, device=this.device)
        this.budget.learn(tokens, size, memory.samples, time.samples)
        fused.budget.learn(tokens, size, memory.fused, time.fused)
        for status in (memory.status, time.status):
            this.budget.stop(status)
        if memory.fused is None:
            fused.budget.stop(OUT_OF_MEMORY)
        elif time.fused is None and time.status == OK:
            fused.budget.stop(OVER_BUDGET)
        if this.budget.status == OUT_OF_MEMORY:
            time = memory = Comparison(OUT_OF_MEMORY)
    place = {"batch_size": size, "tokens": tokens, "mode": this.mode}
    in_ms = time.map(lambda s: s * 1e3 / size).row()
    in_bytes = memory.map(lambda b: b / size).row()
    return [
        place | {"quantity": "time", "unit": "ms"} | in_ms | load,
        place | {"quantity": "memory", "unit": "bytes"} | in_bytes | nothing,
    ]


def _busy(make: MakeCall | None, make_fused: MakeCall | None, device: torch.device) -> float | None:
    """How busy a GPU is at least, with one of both that ran."""
    if device.type != "cuda" or make is None:
        return None
    shares = [busy_share(each(), device) for each in (make, make_fused) if each is not None]
    return min(share for share in shares if share is not None)
