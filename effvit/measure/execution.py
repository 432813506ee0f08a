"""How what is measured runs: its precision, and eagerly, compiled or as CUDA graphs. A part of each result's key."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import NamedTuple, get_args

import torch
from torch import nn

from effvit import policy
from effvit.errors import UserError
from effvit.measure.latency import Call, stopwatch_for

_COMPILE = {"eager": "off", "compiled": "on", "graphs": "graphs"}
_BUSY = 0.8  # share of a call's time that a GPU must compute for the call's time to be the mechanism's
_CYCLES_PER_S = 2e9  # that no GPU's clock exceeds by much


class Execution(NamedTuple):
    """One precision and one way to run. TF32 rounds float32's factors; bfloat16 runs under autocast, with TF32."""

    precision: str = "float32"
    mode: str = "eager"

    def check(self, device: torch.device) -> None:
        """Raise ``UserError`` where the device has no such thing."""
        if self.precision == "tf32" and device.type != "cuda":
            raise UserError("precision=tf32: needs a CUDA device; try float32 or bfloat16")
        if self.mode == "graphs" and device.type != "cuda":
            raise UserError("execution=graphs: needs a CUDA device; try eager or compiled")

    def apply(self, device: torch.device, *, deterministic: bool) -> None:
        """Set PyTorch up, see `effvit.policy.apply`."""
        policy.apply(device, deterministic=deterministic, tf32=self.precision != "float32")

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Context of a forward pass, the results of which the next one may overwrite."""
        if self.mode == "graphs":  # or each compiled block would be a pass of its own
            torch.compiler.cudagraph_mark_step_begin()
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    def prepare(self, module: nn.Module, device: torch.device) -> None:
        """Compile the module's blocks, or itself where it has none, if that is how it runs."""
        if self.mode != "eager":
            from effvit.training.compiling import compile_blocks

            compile_blocks(module, _COMPILE[self.mode], device)


EAGER = Execution()


def executions(precisions: Sequence[str], modes: Sequence[str], device: torch.device) -> list[Execution]:
    """All pairs, the first of each list first.

    Raises:
        UserError: one that the device does not have.
    """
    for name, values, known in (
        ("precision", precisions, get_args(policy.Precision)),
        ("execution", modes, get_args(policy.Execution)),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"{name}={value!r}: unknown, expected one of {', '.join(known)}")
    pairs = [Execution(*pair) for pair in product(dict.fromkeys(precisions), dict.fromkeys(modes))]
    for each in pairs:
        each.check(device)
    return pairs


def busy_share(call: Call, device: torch.device) -> float | None:
    """Share of a call's time in which the GPU computes; None on a CPU.

    The call is timed once more behind a kernel that does nothing for longer than the host takes to launch everything.
    """
    if device.type != "cuda":
        return None
    usual = stopwatch_for(device)(call, 1)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        launching = time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_CYCLES_PER_S * 2 * launching))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return min(1.0, start.elapsed_time(end) / 1e3 / usual)


def launch_bound(share: float | None) -> bool:
    """Whether the time of a call is that of launching it, and no property of what it computes."""
    return share is not None and share < _BUSY
