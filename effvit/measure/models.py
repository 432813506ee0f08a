"""Models of any kind side by side: what each takes of time, memory, multiply-adds and parameters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effvit.errors import UserError, extra_of

if TYPE_CHECKING:
    import pandas as pd


def compare(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    baseline: str | None = None,
    train: bool = False,
    budget_s: float = 10.0,
) -> "pd.DataFrame":
    """Measure models on the same images, timed in turns so that whatever disturbs the machine disturbs all alike.

    The models stay unchanged: weights, buffers, modes and random numbers. Each is measured in the precision in which
    it runs, so under ``torch.autocast`` where this is called there.

    Args:
        models: any modules by name; each maps ``images`` to logits: a tensor, or an object or mapping with ``logits``.
        images: a batch ``(B, channels, height, width)`` where all models are: on the CPU or a CUDA device.
        baseline: name of the model to which ratios are; the first one if not given.
        train: also measure a training step (forward, backward, AdamW), on copies of the models.
        budget_s: seconds of sampling, for a training step again as many. At least six rounds are made whatever they
            take.

    Returns:
        A row for each model, in the order given, with columns

        - ``parameters``; ``macs`` of one image, which are missing where they cannot be counted;
        - ``latency_ms`` of the batch, the median, with quartiles ``latency_q25``, ``latency_q75``; ``images_per_s``;
        - ``latency_ratio``, the median over rounds of the ratio to the baseline, with the ends of its 95 % interval
          ``latency_ratio_low``, ``latency_ratio_high``;
        - ``memory_mib``, the peak of a forward pass above what was resident before, and ``memory_ratio``;
        - ``parameters_ratio``, ``macs_ratio``;
        - ``n_rounds``;
        - with ``train`` the same of a step: ``train_ms``, ``train_ratio``, ``train_memory_mib`` and so on;
        - ``status`` ("ok" or "out of memory"), and ``contended``, whether other processes had a share of the machine
          meanwhile.

    Raises:
        UserError: no model, no such baseline, models and images that do not fit one another, or a package is missing.
    """
    _check(models, images, budget_s)
    first = next(iter(models)) if baseline is None else baseline
    if first not in models:
        raise UserError(f"baseline={baseline!r}: unknown, expected one of {', '.join(models)}")
    try:
        import scipy  # noqa: F401  of the intervals: better missed now than when all is measured

        from effvit.measure.side_by_side import measure_models
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "")
        if extra is None:
            raise
        raise UserError(f"compare needs the package {error.name}: pip install 'effvit[{extra}]'") from error
    return measure_models(models, images, first, train=train, budget_s=budget_s)


def _check(models: Mapping[str, nn.Module], images: Tensor, budget_s: float) -> None:
    if not isinstance(models, Mapping) or not models:
        raise UserError('models: expected a dictionary of at least one, {"name": module}')
    for name, model in models.items():
        if not isinstance(name, str) or not isinstance(model, nn.Module):
            raise UserError(f"models: {name!r} is {type(model).__name__}, expected names and modules")
    if not isinstance(images, Tensor) or images.ndim < 2 or not images.numel():
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"images: got {got}, expected a tensor (batch, channels, height, width)")
    if images.device.type not in ("cpu", "cuda"):
        raise UserError(f"images: on {images.device}, where peak memory cannot be told; expected cpu or cuda")
    if not 0 < budget_s < float("inf"):
        raise UserError(f"budget_s={budget_s}: must be a number above 0")
    for name, model in models.items():
        elsewhere: set[torch.device] = {t.device for t in (*model.parameters(), *model.buffers())} - {images.device}
        if elsewhere:
            raise UserError(
                f"{name}: is on {', '.join(sorted(map(str, elsewhere)))}, the images are on {images.device}"
            )
