"""Where the time of training goes: the input pipeline alone, the step alone (next to timm's), and the whole loop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import quantile_test
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.data.loading.batches import Batch, Place, training_batches
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.measure.latency import interleaved
from effvit.model.vit import ViT, ViTConfig
from effvit.training.compiling import compile_blocks
from effvit.training.loop import Epoch, Training
from effvit.training.optimizer import build_optimizer, clip_gradients
from effvit.training.parallel import make_fabric
from effvit.training.recipe import TrainConfig

STEPS = 10  # of one sample
SelfTimed = Callable[[], float]
"""Does a sample's worth of work; returns the seconds that it took."""


def measure_throughput(
    config: ViTConfig,
    dataset: PreparedDataset,
    recipe: TrainConfig,
    *,
    horizontal_flip: bool,
    peer: bool,
    budget_s: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time the parts of training alternately in one process.

    Args:
        config: model to train.
        dataset: prepared images.
        recipe: batch, augmentation, optimiser, precision and whether to compile, timm's model as well.
        horizontal_flip: whether images are mirrored.
        peer: whether timm's model of the same size makes the same step as well.
        budget_s: seconds of sampling.
        device: what ``recipe.device`` stands for.

    Returns:
        A row for each of ``input`` (images read, augmented, normalised), ``step`` (forward, backward, optimiser on a
        batch that is there), ``timm`` and ``loop`` (steps as training makes them): ``what``, ``images_per_second``,
        ``median_ms, q25_ms, q75_ms`` of a batch, ``n``, and ``speed``, its speed over that of ``step`` (median over
        rounds), with its 95 % interval ``speed_low, speed_high``.

    Raises:
        UserError: fewer training images than a sample needs, or the device does not have the precision.
    """
    if dataset.counts["train"] < STEPS * recipe.batch_size:
        raise UserError(
            f"batch_size={recipe.batch_size}: a sample is {STEPS} batches, and {dataset.name} has only "
            f"{dataset.counts['train']} training images"
        )
    batches = _endless_batches(dataset, recipe, horizontal_flip, Place(device))
    first = next(batches)
    images, targets = first.images, first.targets
    calls = {"input": _timed(lambda: next(batches), device), "step": _step(ViT(config), images, targets, recipe)}
    if peer:
        calls["timm"] = _step(timm_model(config), images, targets, recipe)
    calls["loop"] = _loop(config, dataset, recipe, horizontal_flip)
    seconds = interleaved(calls, budget_s=budget_s, device=device, stopwatch=_own_time)
    return [_row(what, samples, seconds["step"], recipe.batch_size) for what, samples in seconds.items()]


def timm_model(config: ViTConfig) -> nn.Module:
    """Return timm's Vision Transformer of the same size."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_classes,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
    )


def print_throughput(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows, and what they say of pipeline and loop."""
    table = Table(title="training, part by part; speed is relative to the step alone")
    for column in ("part", "images/s", "ms per batch", "speed", "95 % interval", "n"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        few = math.isnan(row["speed_low"])
        interval = "too few samples" if few else f"{row['speed_low']:.2f} – {row['speed_high']:.2f}"
        cells = (f"{row['images_per_second']:,.0f}", f"{row['median_ms']:.1f}", f"{row['speed']:.2f}", interval)
        table.add_row(row["what"], *cells, str(row["n"]))
    console = Console()
    console.print(table)
    if any(math.isnan(row["speed_low"]) for row in rows):
        console.print("a ratio without an interval may be noise: a larger --budget-s gives more samples")
    speed = {row["what"]: [row[key] for key in ("speed", "speed_low", "speed_high")] for row in rows}
    console.print(f"the input pipeline alone delivers {_range(speed['input'], '.1f')} times what the step takes")
    overhead = [1 - speed["loop"][i] for i in (0, 2, 1)]
    console.print(
        f"everything that is not forward, backward and optimiser: {_range(overhead, '.1%')} of a step of the loop"
    )
    if "timm" in speed:
        faster = [1 / speed["timm"][i] for i in (0, 2, 1)]
        console.print(f"the step makes {_range(faster, '.2f')} times timm's images/s")


def _range(values: Sequence[float], form: str) -> str:
    value, low, high = values
    interval = "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"
    return f"{value:{form}}{interval}"


def _endless_batches(
    dataset: PreparedDataset, recipe: TrainConfig, horizontal_flip: bool, place: Place
) -> Iterator[Batch]:
    for epoch in count():
        batches = training_batches(
            dataset,
            recipe.augmentation(horizontal_flip),
            place,
            batch_size=recipe.batch_size,
            seed=0,
            epoch=epoch,
            workers=recipe.workers,
        )
        for batch in batches:
            if batch.total == recipe.batch_size:
                yield batch


def _step(model: nn.Module, images: Tensor, targets: Tensor, recipe: TrainConfig) -> SelfTimed:
    fabric = make_fabric(recipe.device, precision=recipe.precision)
    optimizer = build_optimizer(model, recipe)
    forward, update = fabric.setup(model.train(), optimizer)
    compile_blocks(model, recipe.compile, fabric.device)

    def step() -> None:
        logits = forward(images).float()
        fabric.backward(F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing))
        if recipe.clip_norm:
            clip_gradients(fabric, optimizer, recipe.clip_norm)
        update.step()
        update.zero_grad()

    return _timed(step, images.device)


def _loop(config: ViTConfig, dataset: PreparedDataset, recipe: TrainConfig, horizontal_flip: bool) -> SelfTimed:
    """Epochs of ``STEPS`` steps, which the loop itself times without their validation."""
    recipe = recipe.model_copy(update={"epochs": 10**6})
    part = first_images(dataset, train=STEPS * recipe.batch_size, validation=1)
    training: Training[ViT, PreparedDataset] = Training(config, part, recipe, seed=0, horizontal_flip=horizontal_flip)
    epochs = (event for event in training.run() if isinstance(event, Epoch))
    return lambda: next(epochs).seconds


def first_images(dataset: PreparedDataset, **counts: int) -> PreparedDataset:
    """Return the data set with only the first images of the named parts."""
    arrays = {f"{part}_indices": dataset.arrays[f"{part}_indices"][:count] for part, count in counts.items()}
    return replace(dataset, counts=dataset.counts | counts, arrays={**dataset.arrays, **arrays})


def _timed(call: Callable[[], object], device: torch.device) -> SelfTimed:
    def timed() -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return timed


def _own_time(call: Callable[[], Any], repeats: int) -> float:
    return sum(call() for _ in range(repeats))


def _row(what: str, seconds: np.ndarray, step: np.ndarray, batch_size: int) -> dict[str, Any]:
    q25, median, q75 = (float(q) for q in np.quantile(seconds, [0.25, 0.5, 0.75]) / STEPS)
    speed = step / seconds
    # Between two order statistics: no assumption about how times are distributed, NaN where samples are too few.
    interval: Any = quantile_test(speed, p=0.5).confidence_interval(0.95)
    return {
        "what": what,
        "images_per_second": batch_size / median,
        "median_ms": median * 1e3,
        "q25_ms": q25 * 1e3,
        "q75_ms": q75 * 1e3,
        "n": len(seconds),
        "speed": float(np.median(speed)),
        "speed_low": float(interval.low),
        "speed_high": float(interval.high),
    }
