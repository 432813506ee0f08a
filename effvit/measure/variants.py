"""Several models of one shape timed in turns with the same model with ``fused`` attention."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from effvit.attention import BASELINE
from effvit.measure.compare import MIN_ROUNDS, Row
from effvit.measure.latency import Call, interleaved, paired_interval, paired_ratio
from effvit.measure.peers import PRODUCTS, large_products
from effvit.measure.workload import adamw, inference, training_step
from effvit.model.vit import ViT, ViTConfig


def measure_variants(configs: Sequence[ViTConfig], *, batch_size: int, budget_s: float) -> list[Row]:
    """Time inference and a training step of each model on the CPU.

    Args:
        configs: models that differ in their attention.
        batch_size: images.
        budget_s: seconds of sampling for each model, and again for its training step.

    Returns:
        A row for each model: of inference ``latency_ms`` per batch, ``latency_ratio``, the median over rounds of the
        ratio to ``fused`` without ``value_conv``, with the ends of its 95 % interval ``latency_ratio_low`` and
        ``latency_ratio_high``, and ``floor_share``, the part of the time that the multiply-adds alone take at the
        speed of a large product; of a training step the same with ``step_`` before it.
    """
    plain = {"attention": BASELINE, "attention_options": {}, "value_conv": 0}
    models = [ViT(config) for config in (configs[0].model_copy(update=plain), *configs)]
    rows: list[Row] = [{} for _ in configs]
    device = torch.device("cpu")
    steps = (
        ("", "latency", "forward", partial(inference, batch_size=batch_size, device=device)),
        ("step_", "step", "train", partial(_step, batch_size=batch_size, device=device)),
    )
    for prefix, quantity, mode, make in steps:
        calls: dict[str, Call] = {str(number): make(model) for number, model in enumerate(models)}
        products, flops = large_products(torch.float32, device)
        budget = budget_s * (len(models) + len(products))
        seconds = interleaved(calls | products, budget_s=budget, device=device, min_rounds=MIN_ROUNDS)
        per_flop = min(float(np.median(seconds[name])) for name in products) / flops
        for row, number, model in zip(rows, range(1, len(models)), models[1:], strict=True):
            mine, fused = seconds[str(number)], seconds["0"]
            low, high = paired_interval(mine, fused) or (None, None)
            floor_s = 2 * PRODUCTS[mode] * model.macs() * batch_size * per_flop
            row[f"{quantity}_ms"] = float(np.median(mine)) * 1e3
            row[f"{quantity}_ratio"] = paired_ratio(mine, fused)
            row |= {f"{quantity}_ratio_low": low, f"{quantity}_ratio_high": high}
            row[f"{prefix}floor_share"] = floor_s / float(np.median(mine))
    return rows


def _step(model: ViT, batch_size: int, device: torch.device) -> Call:
    return training_step(model, adamw(model), batch_size, device)
