"""The cost of a whole model: size, exact MACs, latency, throughput, training step and memory, relative to ``fused``."""

from collections.abc import Callable, Iterator
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
from effvit.measure.rss import max_rss_bytes
from effvit.measure.workload import adamw, inference, training_step
from effvit.model.vit import ViT, ViTConfig

COST_STEPS = 6
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
    model = ViT(config).to(device)
    fused = ViT(config.model_copy(update={"attention": BASELINE, "attention_options": {}})).to(device)
    for each in (model, fused):
        how.prepare(each, device)
    infer = partial(_infer, device=device, how=how)
    train = partial(_train, optimisers={m: adamw(m) for m in (model, fused)}, device=device, how=how)

    def seconds(make: Callable[[ViT, int], Call], size: int, fused_size: int) -> Comparison:
        calls = partial(make, model, size), partial(make, fused, fused_size)
        return compare_seconds(*calls, budget_s=budget_s, device=device)

    def peaks(make: Callable[[ViT, int], Call]) -> Comparison:
        return compare_peaks(partial(make, model, batch_size), partial(make, fused, batch_size), device=device)

    def row(quantity: str, size: int | None, unit: str, comparison: Comparison, busy: float | None = None) -> Row:
        place = {"precision": how.precision, "execution": how.mode, "quantity": quantity, "batch_size": size}
        return place | {"unit": unit} | comparison.row() | {"busy": busy, "launch_bound": launch_bound(busy)}

    def ran(timed: Comparison) -> list[ViT]:
        return [m for m, samples in ((model, timed.samples), (fused, timed.fused)) if samples is not None]

    def busy(make: Callable[[ViT, int], Call], size: int, timed: Comparison) -> float | None:
        shares = [busy_share(make(m, size), device) for m in ran(timed)] if device.type == "cuda" else []
        return min((share for share in shares if share is not None), default=None)

    def throughput(quantity: str, seconds: Comparison, size: int, fused_size: int, share: float | None = None) -> Row:
        rate = seconds.map(lambda s: size / s, lambda s: fused_size / s)
        return row(quantity, size, "images/s", rate, share)

    one = seconds(infer, 1, 1).map(lambda s: s * 1e3)
    yield [row("latency", 1, "ms", one, busy(infer, 1, one))]

    forward = seconds(infer, batch_size, batch_size)
    per_image, share = forward.map(lambda s: s * 1e3 / batch_size), busy(infer, batch_size, forward)
    yield [
        row("latency", batch_size, "ms", per_image, share),
        throughput("throughput", forward, batch_size, batch_size, share),
    ]

    largest, fused_largest = (largest_batch(m, memory_mib, device, how) for m in (model, fused))
    if not largest:
        yield [row("throughput", None, "images/s", Comparison(OUT_OF_MEMORY))]
    else:
        fused_largest = max(1, fused_largest)
        yield [throughput("throughput", seconds(infer, largest, fused_largest), largest, fused_largest)]

    step = seconds(train, batch_size, batch_size)
    share = busy(train, batch_size, step)
    yield [
        row("train_step", batch_size, "ms", step.map(lambda s: s * 1e3), share),
        throughput("train_throughput", step, batch_size, batch_size, share),
    ]

    yield [
        row("inference_memory", batch_size, "bytes", peaks(infer)),
        row("train_memory", batch_size, "bytes", peaks(train)),
    ]

    rest: list[Row] = []
    if device.type == "cpu":  # on a GPU a process's resident memory is that of the driver
        rss = max_rss_bytes((config, fused.config), batch_size, how.precision)
        rest.append(row("max_rss", batch_size, "bytes", Comparison.single(*rss)))
    for quantity, make, timed in (("energy", infer, forward), ("train_energy", train, step)):
        joules = [energy_of(make(m, batch_size), budget_s, device) for m in ran(timed)]
        if len(joules) == 2 and None not in joules:
            both = (np.array([each], float) / batch_size for each in joules)
            rest.append(row(quantity, batch_size, "J", Comparison(OK, *both)))
    yield rest


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
