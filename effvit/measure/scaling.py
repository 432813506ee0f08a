"""The cost of one attention block against the number of tokens, beside ``fused``, up to a memory and time budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch

from effvit.attention import BASELINE, Attention, build_attention, check_options
from effvit.errors import UserError
from effvit.measure.compare import OK, OUT_OF_MEMORY, OVER_BUDGET, Comparison, Row, compare_peaks, compare_seconds
from effvit.measure.growth import Budget
from effvit.measure.latency import Call
from effvit.measure.macs import count_macs
from effvit.measure.workload import block_forward, block_training

MODES = {"forward": block_forward, "train": block_training}


@dataclass(frozen=True)
class Block:
    """One attention block, but for the number of tokens."""

    attention: str
    options: dict[str, Any]
    dim: int
    num_heads: int

    def build(self, tokens: int) -> Attention:
        """Build the block for a square grid of ``tokens - 1`` patches; raises ``UserError`` where that cannot be."""
        return build_attention(self.attention, self.dim, self.num_heads, square_grid(tokens), **self.options)

    def check(self, tokens: int) -> None:
        """Raise ``UserError`` for options that are wrong, naming the token count where they do not fit it."""
        check_options(self.attention, self.options)
        try:
            check_options(self.attention, self.options, square_grid(tokens))
        except UserError as error:
            raise UserError(f"tokens={tokens}: {error}") from error

    def fits(self, tokens: int) -> bool:
        """Whether the mechanism's options fit this many tokens."""
        try:
            self.check(tokens)
        except UserError:
            return False
        return True

    def macs(self, tokens: int) -> int:
        """Exact multiply-adds of one forward pass for one sample."""
        return count_macs(self.build(tokens), torch.empty(1, tokens, self.dim))


def square_grid(tokens: int) -> tuple[int, int]:
    """Return the grid of a class token and a square of patches.

    Raises:
        UserError: ``tokens`` is not 1 + n².
    """
    side = isqrt(max(0, tokens - 1))
    if side < 1 or side**2 != tokens - 1:
        side = max(1, side)
        raise UserError(
            f"tokens={tokens}: must be 1 + n², a class token and a square grid of patches, "
            f"for example {1 + side**2} or {1 + (side + 1) ** 2}"
        )
    return side, side


def measure_scaling(
    block: Block, tokens: Sequence[int], *, batch_size: int, memory_mib: float, budget_s: float, device: torch.device
) -> Iterator[list[Row]]:
    """Measure time and peak memory of one block's forward and training pass, from few tokens to many.

    A point is "out of memory" if it needs, or by the points before it would need, more than ``memory_mib`` above
    what is resident; it is "over budget" if a single call takes, or would take, ``LONGEST_CALL`` times
    ``budget_s``. Larger points are then not tried.

    Args:
        block: the block.
        tokens: token counts, each 1 + n².
        batch_size: samples of a batch.
        memory_mib: MiB that a pass may take.
        budget_s: seconds spent on sampling each point.
        device: cpu or cuda.

    Yields:
        For each token count, two rows (time and memory) of each mode: ``tokens, mode, quantity, unit`` and the
        columns of ``Comparison.row``.
    """
    fused = Block(BASELINE, {}, block.dim, block.num_heads)
    subjects = {
        mode: [_Subject(b, mode, batch_size, device, Budget(memory_mib, budget_s)) for b in (block, fused)]
        for mode in MODES
    }
    for count in with_probes(block, tokens):
        rows = [row for mode in MODES for row in _point(count, *subjects[mode])]
        if count in tokens:
            yield rows


def with_probes(block: Block, tokens: Sequence[int]) -> list[int]:
    """Add token counts so that none has more than four times the patches of the one before, from 65 tokens on.

    What is measured there foretells what the larger ones need, before they are tried.
    """
    counts: list[int] = []
    for count in sorted(set(tokens)):
        side = isqrt(counts[-1] - 1) * 2 if counts else 8
        while 1 + side**2 < count:
            if block.fits(1 + side**2):
                counts.append(1 + side**2)
            side *= 2
        counts.append(count)
    return counts


@dataclass(frozen=True)
class _Subject:
    block: Block
    mode: str
    batch_size: int
    device: torch.device
    budget: Budget

    def make(self, tokens: int) -> Call:
        module = self.block.build(tokens).to(self.device)
        return MODES[self.mode](module, torch.randn(self.batch_size, tokens, self.block.dim, device=self.device))


def _point(tokens: int, this: _Subject, fused: _Subject) -> list[Row]:
    time = memory = Comparison(this.budget.foresee(tokens))
    if time.status == OK:
        make = partial(this.make, tokens)
        make_fused = partial(fused.make, tokens) if fused.budget.foresee(tokens) == OK else None
        # Time before memory, so that nothing is left which only a first call allocates.
        time = compare_seconds(make, make_fused, budget_s=this.budget.sampling_s, device=this.device)
        if time.status != OUT_OF_MEMORY:
            memory = compare_peaks(make, make_fused, device=this.device)
        this.budget.learn(tokens, memory.samples, time.samples)
        fused.budget.learn(tokens, memory.fused, time.fused)
        for status in (memory.status, time.status):
            this.budget.stop(status)
        if memory.fused is None:
            fused.budget.stop(OUT_OF_MEMORY)
        elif time.fused is None and time.status == OK:
            fused.budget.stop(OVER_BUDGET)
        if this.budget.status == OUT_OF_MEMORY:
            time = memory = Comparison(OUT_OF_MEMORY)
    place = {"tokens": tokens, "mode": this.mode}
    in_ms = time.map(lambda s: s * 1e3)
    return [
        place | {"quantity": "time", "unit": "ms"} | in_ms.row(),
        place | {"quantity": "memory", "unit": "bytes"} | memory.row(),
    ]
