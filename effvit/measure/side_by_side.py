"""The measurement behind ``effvit.compare``."""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from effvit.errors import UserError
from effvit.measure.alone import Load, measuring_alone
from effvit.measure.compare import MIN_ROUNDS, OK, OUT_OF_MEMORY, Row, peak_or_none
from effvit.measure.latency import Call, interleaved, paired_interval, paired_ratio, summarise
from effvit.measure.macs import count_macs
from effvit.measure.memory import MIB
from effvit.memory import is_out_of_memory
from effvit.model.logits import logits_of

Make = Callable[[nn.Module, Tensor], Call]


def measure_models(
    models: Mapping[str, nn.Module], images: Tensor, baseline: str, *, train: bool, budget_s: float
) -> pd.DataFrame:
    """See `effvit.measure.models.compare`, which has checked the arguments."""
    rows: dict[str, Row] = {name: _size(model, images) for name, model in models.items()}
    with _kept(models, images.device), measuring_alone(images.device):
        meanwhile = Load(images.device)
        _require_alike(models, images, baseline)
        makes: dict[str, Make] = {"latency": _forward}
        if train:
            makes["train"] = _training_step
        for quantity, make in makes.items():
            calls = {name: _made(partial(make, model, images), name) for name, model in models.items()}
            measured = _measure(calls, quantity, baseline, len(images), budget_s, images.device)
            for name, row in measured.items():
                worst = rows[name].get("status", OK)
                rows[name] |= row | {"status": row["status"] if worst == OK else worst}
            del calls
        contended = meanwhile.contended()
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    status = frame.pop("status")
    frame = frame.apply(pd.to_numeric)
    for place, column in ((1, "parameters"), (3, "macs")):
        frame.insert(place, f"{column}_ratio", frame[column] / frame.loc[baseline, column])
    whole = [column for column in frame if column == "macs" or str(column).endswith("n_rounds")]
    return frame.assign(status=status, contended=contended).astype(dict.fromkeys(whole, "Int64"))


def _size(model: nn.Module, images: Tensor) -> Row:
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": _macs(model, images)}


def _macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds of one image; not a number where counting fails, which it may for any reason of the model's."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return count_macs(model, images) or float("nan")
    except Exception:
        return float("nan")


@contextmanager
def _kept(models: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    """Leave modes and random numbers as they were."""
    training = {module: module.training for model in models.values() for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, was in training.items():
            module.training = was


def _require_alike(models: Mapping[str, nn.Module], images: Tensor, baseline: str) -> None:
    """Raise ``UserError`` where a model does not take the images, or gives others than the baseline's logits."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, model in models.items():
        try:
            with torch.no_grad():
                shapes[name] = tuple(logits_of(model.eval()(images)).shape)
        except Exception as error:  # whatever a module of anyone's raises
            if not is_out_of_memory(error):
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                shape = f"{tuple(images.shape)} and {images.dtype}"
                raise UserError(f"{name}: does not run on images of shape {shape}: {reason}") from error
    wanted = shapes.get(baseline)
    for name, given in shapes.items():
        if wanted is not None and given != wanted:
            raise UserError(f"{name}: gives logits {given}, {baseline} {wanted}; expected models of the same task")


def _forward(model: nn.Module, images: Tensor) -> Call:
    model.eval()

    @torch.no_grad()  # not inference mode, whose tensors a model of anyone's may keep and not be trained with
    def call() -> object:
        return model(images)

    return call


def _training_step(model: nn.Module, images: Tensor) -> Call:
    trained = copy.deepcopy(model).train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("has no parameter that requires a gradient, hence no training step")
    optimiser = torch.optim.AdamW(parameters, lr=0.0)

    def call() -> None:
        with torch.enable_grad():
            logits_of(trained(images)).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return call


def _made(make: Callable[[], Call], name: str) -> Call | None:
    """A call that ran twice, so that all it needs is there; None where memory runs out."""
    try:
        call = make()
        call()
        call()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return call


def _measure(
    calls: Mapping[str, Call | None],
    quantity: str,
    baseline: str,
    batch_size: int,
    budget_s: float,
    device: torch.device,
) -> dict[str, Row]:
    peaks = {
        name: None if call is None else peak_or_none(partial(_itself, call), device) for name, call in calls.items()
    }
    able = {name: call for name, call in calls.items() if call is not None and peaks[name] is not None}
    samples = interleaved(able, budget_s=budget_s, device=device, min_rounds=MIN_ROUNDS) if able else {}
    prefix, reference = "" if quantity == "latency" else f"{quantity}_", peaks[baseline]
    columns = ["ms", "q25", "q75", "ratio", "ratio_low", "ratio_high"]
    empty: Row = dict.fromkeys([f"{quantity}_{column}" for column in columns])
    empty |= {f"{prefix}images_per_s": None, f"{prefix}memory_mib": None, f"{prefix}memory_ratio": None}
    empty |= {f"{prefix}n_rounds": None}
    rows: dict[str, Row] = {name: empty | {"status": OUT_OF_MEMORY} for name in calls}
    for name, seconds in samples.items():
        peak, times = peaks[name], summarise(seconds * 1e3)
        assert peak is not None
        row: Row = {f"{quantity}_{column}": times[column] for column in ("q25", "q75")}
        row |= {f"{quantity}_ms": times["median"], f"{prefix}images_per_s": batch_size * 1e3 / times["median"]}
        row |= {f"{prefix}memory_mib": peak / MIB, f"{prefix}n_rounds": len(seconds), "status": OK}
        if baseline in samples:
            low, high = paired_interval(seconds, samples[baseline]) or (None, None)
            row |= {f"{quantity}_ratio": paired_ratio(seconds, samples[baseline])}
            row |= {f"{quantity}_ratio_low": low, f"{quantity}_ratio_high": high}
            row |= {f"{prefix}memory_ratio": peak / reference if reference else None}
        rows[name] |= row
    return rows


def _itself(call: Call) -> Call:
    return call
