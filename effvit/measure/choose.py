"""Which mechanism to take: whole models and attention blocks of all mechanisms, timed in turns on this machine."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from effvit import policy
from effvit.attention import BASELINE
from effvit.errors import UserError
from effvit.measure.alone import Load
from effvit.measure.compare import OK, MakeCall, Row, peak_or_none, try_out
from effvit.measure.execution import Execution, executions
from effvit.measure.latency import (
    Call,
    Stopwatch,
    interleaved,
    paired_interval,
    paired_ratio,
    stopwatch_for,
    summarise,
)
from effvit.memory import is_out_of_memory
from effvit.model.vit import ViT, ViTConfig

CONTROL = "uniform"  # measured to see what is left, and no choice
CUDNN = "fused_cudnn"  # exact attention by cuDNN's kernel: a second baseline on GPUs, and no mechanism
_SHARES = {"model": 0.75, "block": 0.25}  # of the seconds for one image size
_SLOWEST = 0.25  # of those seconds: a single call may take no longer, or the others would have too few
_TRYING = 0.1  # share of the progress while all are called for the first time
_MIN_ROUNDS = 6  # the fewest of which a median has a 95 % interval without assumptions


@dataclass(frozen=True)
class Candidate:
    """A model with one mechanism: itself, its first attention block, and what both take and cost."""

    model: nn.Module
    block: nn.Module
    image_shape: tuple[int, int, int]  # channels, height, width
    token_shape: tuple[int, int]  # N, C
    macs: dict[str, int | None]  # of one image, by scope; None where weights have no numbers to count them with

    def options(self) -> str:
        """The mechanism's options, given or default, as JSON."""
        options = getattr(self.block, "options", None)
        return json.dumps(options.model_dump(mode="json") if options else {})


Progress = Callable[[float, str], object]
"""Called with the share of the work that is done, and what is being done."""
Build = Callable[[str, int], Candidate]
"""A candidate by mechanism and image size in pixels."""


def builder(fields: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> Build:
    """Return what builds our ViT from fields of `ViTConfig`, with the options given for a mechanism or its defaults."""

    def build(attention: str, image_size: int) -> Candidate:
        values = {**fields, "image_size": image_size, "attention": attention}
        model = ViT(ViTConfig.from_dict(values | {"attention_options": dict(options.get(attention, {}))}))
        config, block = model.config, model.attentions()[0]
        image_shape = (config.num_channels, *config.image_shape)
        macs: dict[str, int | None] = {"model": model.macs(), "block": block.macs()}
        return Candidate(model, block, image_shape, (config.num_tokens, config.hidden_size), macs)

    return build


def measure_choice(
    build: Build,
    attentions: Sequence[str],
    image_sizes: Sequence[int],
    *,
    batch_size: int,
    precision: str,
    budget_s: float,
    device: torch.device,
    progress: Progress = lambda share, what: None,
) -> Iterator[list[Row]]:
    """Time a forward pass of the whole model and of its first attention block, every mechanism compared with ``fused``.

    Args:
        build: gives the models.
        attentions: mechanisms to compare; ``fused`` is added where it is missing, and in bfloat16 on a GPU `CUDNN`.
        image_sizes: heights and widths in pixels, which the patch size divides.
        batch_size: images at a time.
        precision: ``float32``, on a GPU ``tf32``, or ``bfloat16`` by autocast.
        budget_s: seconds of sampling for all image sizes together.
        device: cpu or cuda.
        progress: called as the work proceeds.

    Yields:
        For each image size a row for each scope (``model``, ``block``) and mechanism: ``image_size, tokens, scope,
        attention``, its ``options`` as JSON, ``batch_size``, milliseconds of an image ``median, q25, q75, n``,
        ``ratio_to_fused`` with its 95 % interval ``ratio_low, ratio_high``, peak ``memory_bytes`` of a call,
        ``parameters``, ``macs`` of an image, ``status``, which is ``out of memory`` also where that is so while
        building, and ``other_load`` and ``contended``, whether other processes had a share of the machine meanwhile.

    Raises:
        UserError: a model or mechanism does not fit an image size; before anything is measured.
    """
    (how,) = executions([precision], ["eager"], device)
    names = compared(attentions, how, device)
    with torch.device("meta"):  # no memory, as these are only looked at
        planned = {size: {name: _built(build, mechanism(name), size) for name in names} for size in image_sizes}
    for number, size in enumerate(image_sizes):
        candidates = {}
        for name in names:
            progress(number / len(image_sizes), f"building {name}, {size} px")
            candidates[name] = _built_if_memory_suffices(build, mechanism(name), size)
        rows: list[Row] = []
        done = 0.0  # of this image size
        for scope, share in _SHARES.items():
            makes: dict[str, MakeCall] = {
                name: partial(_call, candidate, scope, batch_size, how, device, cudnn=name == CUDNN)
                for name, candidate in candidates.items()
            }
            within = partial(_progress_within, progress, number + done, share, len(image_sizes), f"{scope}, {size} px")
            timed = _timed(makes, batch_size, share * budget_s / len(image_sizes), device, within)
            done += share
            for name in names:
                candidate = candidates[name] or planned[size][name]
                place = {"image_size": size, "tokens": candidate.token_shape[0], "scope": scope, "attention": name}
                cost = {
                    "memory_bytes": peak_or_none(makes[name], device),
                    "parameters": sum(p.numel() for p in getattr(candidate, scope).parameters()),
                    "macs": candidate.macs[scope],
                }
                rows.append(place | {"options": candidate.options(), "batch_size": batch_size} | timed[name] | cost)
        yield rows


def compared(attentions: Sequence[str], how: Execution, device: torch.device) -> list[str]:
    """The baselines and the mechanisms; cuDNN's kernel takes half precision alone."""
    baselines = [BASELINE, CUDNN] if device.type == "cuda" and how.precision == "bfloat16" else [BASELINE]
    return list(dict.fromkeys((*baselines, *attentions)))


def mechanism(name: str) -> str:
    """The mechanism that a row is of."""
    return BASELINE if name == CUDNN else name


def _progress_within(
    progress: Progress, start: float, share: float, sizes: int, where: str, done: float, what: str
) -> None:
    progress((start + share * done) / sizes, f"{what}, {where}")


def _built_if_memory_suffices(build: Build, attention: str, image_size: int) -> Candidate | None:
    try:
        return _built(build, attention, image_size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _built(build: Build, attention: str, image_size: int) -> Candidate:
    try:
        return build(attention, image_size)
    except UserError as error:
        raise UserError(f"image_size={image_size}, attention={attention}: {error}") from error


def _call(
    candidate: Candidate | None,
    scope: str,
    batch_size: int,
    how: Execution,
    device: torch.device,
    cudnn: bool = False,
) -> Call:
    """A forward pass; raises ``MemoryError`` where memory did not suffice to build the candidate."""
    if candidate is None:
        raise MemoryError
    model = candidate.model.eval().to(device)
    shape = candidate.image_shape if scope == "model" else candidate.token_shape
    module, x = model if scope == "model" else candidate.block, torch.randn(batch_size, *shape, device=device)

    kernel = policy.cudnn_attention if cudnn else nullcontext

    @torch.inference_mode()
    def call() -> object:
        with how.autocast(device), kernel():
            return module(x)

    return call


def _timed(
    makes: dict[str, MakeCall], batch_size: int, budget_s: float, device: torch.device, progress: Progress
) -> dict[str, Row]:
    """By mechanism: columns of time, ratio, status and contention."""
    statuses, able = {}, {}
    for number, (name, make) in enumerate(makes.items()):
        progress(_TRYING * number / len(makes), f"trying {name}")
        statuses[name], call = try_out(make, _SLOWEST * budget_s, device)
        if call is not None:
            able[name] = call
    stopwatch = _with_progress(stopwatch_for(device), budget_s, progress)
    meanwhile = Load(device)
    samples = (
        interleaved(able, budget_s=budget_s, device=device, min_rounds=_MIN_ROUNDS, stopwatch=stopwatch) if able else {}
    )
    load = {"other_load": meanwhile.other_load(), "contended": meanwhile.contended()}
    rows = {}
    for name, status in statuses.items():
        row: Row = dict.fromkeys(("median", "q25", "q75", "n", "ratio_to_fused", "ratio_low", "ratio_high"))
        if status == OK:
            figures = summarise(samples[name] * 1e3 / batch_size)
            row |= {key: figures[key] for key in ("median", "q25", "q75", "n")}
            if BASELINE in able:
                row["ratio_to_fused"] = paired_ratio(samples[name], samples[BASELINE])
                interval = paired_interval(samples[name], samples[BASELINE])
                row["ratio_low"], row["ratio_high"] = interval or (None, None)
        rows[name] = row | {"status": status} | load
    return rows


def _with_progress(measure: Stopwatch, budget_s: float, progress: Progress) -> Stopwatch:
    """A stopwatch that tells which part of the budget it has measured."""
    spent = 0.0

    def stopwatch(call: Call, repeats: int) -> float:
        nonlocal spent
        seconds = measure(call, repeats)
        spent += seconds
        progress(_TRYING + (1 - _TRYING) * min(1.0, spent / budget_s), "timing all in turns")
        return seconds

    return stopwatch


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence on an image size: what is faster than ``fused`` as a whole model, and what takes least memory.

    The control, which mixes by no weights, is no choice.
    """
    models = [row for row in rows if row["scope"] == "model" and row["attention"] != CONTROL]
    where = "{image_size} px, {tokens} tokens".format(**models[0])
    (fused,) = (row for row in models if row["attention"] == BASELINE)
    if fused["status"] != OK:
        return f"{where}: fused is {fused['status']} here, so there is nothing to compare with."
    faster = [row for row in models if row["ratio_high"] is not None and row["ratio_high"] < 1]
    text = f"{where}: no mechanism is faster than fused beyond timing noise"
    if faster:
        best = min(faster, key=lambda row: row["ratio_to_fused"])
        text = (
            f"{where}: {best['attention']} is the fastest, {best['ratio_to_fused']:.2f} of fused's time "
            f"({best['ratio_low']:.2f} to {best['ratio_high']:.2f})"
        )
    measured = [row for row in models if row["memory_bytes"] is not None]
    least = min(measured, key=lambda row: row["memory_bytes"], default=fused)
    if fused["memory_bytes"] is not None and least["memory_bytes"] < fused["memory_bytes"]:
        share = least["memory_bytes"] / fused["memory_bytes"]
        text += f"; {least['attention']} takes least memory, {share:.2f} of fused's"
    busy = "; other processes were running, so measure again on an idle machine" if fused["contended"] else ""
    return f"{text}{busy}."
