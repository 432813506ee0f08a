"""The cost of a whole model: size, exact MACs, latency, throughput, training step and memory, relative to ``fused``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from effvit.attention import BASELINE
from effvit.measure.compare import (
    OK,
    OUT_OF_MEMORY,
    Comparison,
    Row,
    compare_peaks,
    compare_seconds,
    peak_or_none,
)
from effvit.measure.energy import energy_of
from effvit.measure.execution import EAGER, Execution, busy_share, launch_bound
from effvit.measure.latency import Call
from effvit.measure.macs import count_macs
from effvit.measure.memory import MIB, resident_bytes
from effvit.measure.workload import adamw, inference, training_step
from effvit.model.vit import ViT, ViTConfig

COST_STEPS = 6
_Make = Callable[[ViT, int], Call]
_MOST = 2**20  # images at once


def model_size(config: ViTConfig) -> dict[str, int]:
    """Parameters, tokens and exact MACs of one image; ``attention_macs`` are those of one block's attention."""
    model = ViT(config)
    image = torch.empty(1, config.num_channels, *config.image_shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "macs": count_macs(model, image),
        "macs_closed_form": model.macs(),
        "attention_macs": model.attentions()[0].macs(),
        "tokens": config.num_tokens,
    }


def measure_cost(
    config: ViTConfig,
    *,
    batch_size: int,
    memory_mib: float,
    budget_s: float,
    device: torch.device,
    how: Execution = EAGER,
) -> Iterator[list[Row]]:
    """Measure a model and the same model with ``fused`` attention.

    Args:
        config: the model.
        batch_size: images of the benchmark batch.
        memory_mib: MiB that weights, images and inference may take at the largest batch; each of the two models
            runs at its own.
        budget_s: seconds spent on sampling each quantity; a call of ``LONGEST_CALL`` times that is over budget.
        device: cpu or cuda.
        how: precision, and whether it is compiled.

    Yields:
        ``COST_STEPS`` lists of rows: ``precision, execution, quantity, batch_size, unit``, the columns of
        ``Comparison.row``, and of times on a GPU ``busy`` and ``launch_bound`` as `measure_scaling` has them. There are
        rows of ``energy`` where the driver or the processor counts it, and none of resident memory on a GPU.
    """
    fused_config = config.model_copy(update={"attention": BASELINE, "attention_options": {}})
    pair = _Pair(ViT(config).to(device), ViT(fused_config).to(device), budget_s, device, how)
    for model in (pair.model, pair.fused):
        how.prepare(model, device)
    infer = partial(_infer, device=device, how=how)
    train = partial(_train, optimisers={m: adamw(m) for m in (pair.model, pair.fused)}, device=device, how=how)

    one = pair.seconds(infer, 1, 1).map(lambda s: s * 1e3)
    yield [pair.row("latency", 1, "ms", one, pair.busy(infer, 1, one))]

    forward = pair.seconds(infer, batch_size, batch_size)
    per_image, share = forward.map(lambda s: s * 1e3 / batch_size), pair.busy(infer, batch_size, forward)
    yield [
        pair.row("latency", batch_size, "ms", per_image, share),
        pair.throughput("throughput", forward, batch_size, batch_size, share),
    ]

    largest, fused_largest = (largest_batch(m, memory_mib, device, how) for m in (pair.model, pair.fused))
    if not largest:
        yield [pair.row("throughput", None, "images/s", Comparison(OUT_OF_MEMORY))]
    else:
        fused_largest = max(1, fused_largest)
        yield [pair.throughput("throughput", pair.seconds(infer, largest, fused_largest), largest, fused_largest)]

    step = pair.seconds(train, batch_size, batch_size)
    share = pair.busy(train, batch_size, step)
    yield [
        pair.row("train_step", batch_size, "ms", step.map(lambda s: s * 1e3), share),
        pair.throughput("train_throughput", step, batch_size, batch_size, share),
    ]

    yield [
        pair.row("inference_memory", batch_size, "bytes", pair.peaks(infer, batch_size)),
        pair.row("train_memory", batch_size, "bytes", pair.peaks(train, batch_size)),
    ]

    rest: list[Row] = []
    for quantity, make, timed in (("energy", infer, forward), ("train_energy", train, step)):
        if energy := pair.energy(make, batch_size, timed):
            rest.append(pair.row(quantity, batch_size, "J", energy))
    yield rest


@dataclass(frozen=True)
class _Pair:
    """A model and the same model with ``fused`` attention."""

    model: ViT
    fused: ViT
    budget_s: float
    device: torch.device
    how: Execution

    def seconds(self, make: _Make, size: int, fused_size: int) -> Comparison:
        calls = partial(make, self.model, size), partial(make, self.fused, fused_size)
        return compare_seconds(*calls, budget_s=self.budget_s, device=self.device)

    def peaks(self, make: _Make, size: int) -> Comparison:
        return compare_peaks(partial(make, self.model, size), partial(make, self.fused, size), device=self.device)

    def busy(self, make: _Make, size: int, timed: Comparison) -> float | None:
        """How busy a GPU is at least, with one of both that ran."""
        if self.device.type != "cuda":
            return None
        shares = [busy_share(make(model, size), self.device) for model in self._ran(timed)]
        return min((share for share in shares if share is not None), default=None)

    def energy(self, make: _Make, size: int, timed: Comparison) -> Comparison | None:
        """Joules of an image; None where nothing counts them, or one of both did not run."""
        joules = [energy_of(make(model, size), self.budget_s, self.device) for model in self._ran(timed)]
        if len(joules) < 2 or None in joules:
            return None
        return Comparison(OK, *(np.array([each], float) / size for each in joules))

    def throughput(self, quantity: str, seconds: Comparison, size: int, fused: int, busy: float | None = None) -> Row:
        return self.row(quantity, size, "images/s", seconds.map(lambda s: size / s, lambda s: fused / s), busy)

    def row(self, quantity: str, size: int | None, unit: str, comparison: Comparison, busy: float | None = None) -> Row:
        place = {"precision": self.how.precision, "execution": self.how.mode, "quantity": quantity, "batch_size": size}
        return place | {"unit": unit} | comparison.row() | {"busy": busy, "launch_bound": launch_bound(busy)}

    def _ran(self, timed: Comparison) -> list[ViT]:
        both = (self.model, timed.samples), (self.fused, timed.fused)
        return [model for model, samples in both if samples is not None]


def largest_batch(model: ViT, memory_mib: float, device: torch.device, how: Execution = EAGER) -> int:
    """Images whose inference fits into ``memory_mib`` together with the weights; 0 where not even one does.

    Memory grows linearly with the batch: two small batches give the line, and what it promises is verified.
    """
    limit = memory_mib * MIB - resident_bytes(model)

    def fits(size: int) -> bool:
        return needs(size) <= limit

    def needs(size: int) -> float:
        def load_and_infer() -> None:
            inference(model, size, device, how)()

        peak = peak_or_none(lambda: load_and_infer, device)
        return float("inf") if peak is None else peak

    two, four = needs(2), needs(4)
    if four > limit:
        return next((size for size in (3, 2, 1) if fits(size)), 0)
    size = 4
    while four <= two and size < _MOST:  # where memory comes in blocks that both fill
        size *= 2
        four = needs(size)
    batch = 2 + int((limit - two) * (size - 2) / (four - two)) if four > two else size
    while not fits(batch):
        batch = batch * 15 // 16
    return batch


def _infer(model: ViT, size: int, *, device: torch.device, how: Execution) -> Call:
    return inference(model, size, device, how)


def _train(
    model: ViT, size: int, *, optimisers: dict[ViT, torch.optim.AdamW], device: torch.device, how: Execution
) -> Call:
    return training_step(model, optimisers[model], size, device, how)
