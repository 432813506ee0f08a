"""The cost of a whole model: size, exact MACs, latency, throughput, training step and memory, relative to ``fused``."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from effvit.attention import BASELINE
from effvit.measure.compare import (
    OUT_OF_MEMORY,
    Comparison,
    Row,
    compare_peaks,
    compare_seconds,
    peak_or_none,
)
from effvit.measure.latency import Call
from effvit.measure.macs import count_macs
from effvit.measure.memory import MIB, resident_bytes
from effvit.measure.rss import max_rss_bytes
from effvit.measure.workload import adamw, inference, training_step
from effvit.model.vit import ViT, ViTConfig

COST_STEPS = 6


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
    config: ViTConfig, *, batch_size: int, memory_mib: float, budget_s: float, device: torch.device
) -> Iterator[list[Row]]:
    """Measure a model and the same model with ``fused`` attention.

    Args:
        config: the model.
        batch_size: images of the benchmark batch.
        memory_mib: MiB that weights, images and inference may take at the largest batch; each of the two models
            runs at its own.
        budget_s: seconds spent on sampling each quantity; a call of ``LONGEST_CALL`` times that is over budget.
        device: cpu or cuda.

    Yields:
        ``COST_STEPS`` lists of rows: ``quantity, batch_size, unit`` and the columns of ``Comparison.row``.
    """
    model = ViT(config).to(device)
    fused = ViT(config.model_copy(update={"attention": BASELINE, "attention_options": {}})).to(device)
    infer = partial(_infer, device=device)
    train = partial(_train, optimisers={m: adamw(m) for m in (model, fused)}, device=device)

    def seconds(make: Callable[[ViT, int], Call], size: int, fused_size: int) -> Comparison:
        calls = partial(make, model, size), partial(make, fused, fused_size)
        return compare_seconds(*calls, budget_s=budget_s, device=device)

    def peaks(make: Callable[[ViT, int], Call]) -> Comparison:
        return compare_peaks(partial(make, model, batch_size), partial(make, fused, batch_size), device=device)

    yield [_row("latency", 1, "ms", seconds(infer, 1, 1).map(lambda s: s * 1e3))]

    forward = seconds(infer, batch_size, batch_size)
    per_image = forward.map(lambda s: s * 1e3 / batch_size)
    yield [_row("latency", batch_size, "ms", per_image), _throughput("throughput", forward, batch_size)]

    largest, fused_largest = (largest_batch(m, memory_mib, device) for m in (model, fused))
    if not largest:
        yield [_row("throughput", None, "images/s", Comparison(OUT_OF_MEMORY))]
    else:
        fused_largest = max(1, fused_largest)
        yield [_throughput("throughput", seconds(infer, largest, fused_largest), largest, fused_largest)]

    step = seconds(train, batch_size, batch_size)
    in_ms = step.map(lambda s: s * 1e3)
    yield [_row("train_step", batch_size, "ms", in_ms), _throughput("train_throughput", step, batch_size)]

    yield [
        _row("inference_memory", batch_size, "bytes", peaks(infer)),
        _row("train_memory", batch_size, "bytes", peaks(train)),
    ]
    rss = max_rss_bytes((config, fused.config), batch_size, device)
    yield [_row("max_rss", batch_size, "bytes", Comparison.single(*rss))]


def largest_batch(model: ViT, memory_mib: float, device: torch.device) -> int:
    """Images whose inference fits into ``memory_mib`` together with the weights; 0 where not even one does.

    Memory grows linearly with the batch: two small batches give the line, and what it promises is verified.
    """
    limit = memory_mib * MIB - resident_bytes(model)

    def fits(size: int) -> bool:
        return needs(size) <= limit

    def needs(size: int) -> float:
        def load_and_infer() -> None:
            inference(model, size, device)()

        peak = peak_or_none(lambda: load_and_infer, device)
        return float("inf") if peak is None else peak

    two, four = needs(2), needs(4)
    if four > limit:
        return next((size for size in (3, 2, 1) if fits(size)), 0)
    batch = 2 + int((limit - two) * 2 / (four - two))
    while not fits(batch):
        batch = batch * 15 // 16
    return batch


def _infer(model: ViT, size: int, *, device: torch.device) -> Call:
    return inference(model, size, device)


def _train(model: ViT, size: int, *, optimisers: dict[ViT, torch.optim.AdamW], device: torch.device) -> Call:
    return training_step(model, optimisers[model], size, device)


def _throughput(quantity: str, seconds: Comparison, size: int, fused_size: int | None = None) -> Row:
    rate = seconds.map(lambda s: size / s, lambda s: (fused_size or size) / s)
    return _row(quantity, size, "images/s", rate)


def _row(quantity: str, batch_size: int | None, unit: str, comparison: Comparison) -> Row:
    return {"quantity": quantity, "batch_size": batch_size, "unit": unit} | comparison.row()
