"""The tables of the report: text for the eye, a key for sorting, and what a column means."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, nan
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import at_largest_batch
from effvit.report.representations import VARIANT, closest, similarity_to_fused
from effvit.report.resolution import (
    HOW_LENGTHS_ARE_KNOWN,
    PASSES,
    QUANTITIES,
    length_interval,
    length_text,
    one_block,
    slope,
)
from effvit.report.tables import Study, by_attention, records


@dataclass(frozen=True)
class Cell:
    """One entry; `key` is what it is sorted by, empty where unknown."""

    text: str
    key: float | str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted; without rows it says so."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    numeric: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        """A column is numeric where something is sorted, and nothing as text."""
        keys = [[row[i].key for row in self.rows] for i in range(len(self.columns))]
        object.__setattr__(
            self,
            "numeric",
            [all(not isinstance(k, str) for k in column if k != "") and set(column) != {""} for column in keys],
        )


def text(value: Any) -> Cell:
    """A word, or a dash where there is none."""
    return Cell("–") if pd.isna(value) else Cell(str(value), str(value))


def number(value: Any, show: Callable[[float], str] = lambda x: f"{x:,.0f}") -> Cell:
    """A number as `show` writes it, sorted by its value; a dash where it is unknown."""
    return Cell("–") if pd.isna(value) or not isfinite(value) else Cell(show(float(value)), float(value))


def mechanism(attention: str) -> Cell:
    """The label of a mechanism."""
    return Cell(w.name(attention), w.name(attention))


def accuracy_and_cost(study: Study, dataset: str) -> Table:
    """Every mechanism of one data set: accuracy and cost."""
    cost = study.of("cost", dataset)
    latency, step, memory = (by_attention(at_largest_batch(cost, q)) for q in ("latency", "train_step", "train_memory"))
    one = by_attention(cost[(cost["quantity"] == "latency") & (cost["batch_size"] == 1)])
    baseline = one.get("fused", {}).get("median", nan)
    batch = "".join(f", batch {row['batch_size']:.0f}" for row in list(latency.values())[:1] if row["batch_size"] > 0)
    accuracy = by_attention(study.of("accuracy", dataset))
    fused = accuracy.get("fused", {}).get("parameters")
    rows = [
        [
            mechanism(attention),
            _top1(row),
            number(row["parameters"], partial(_marked, fused=fused)),
            number(row["gmacs"] * 1e3, lambda x: f"{x:,.2f}" if x < 100 else f"{x:,.0f}"),
            _ratio(one.get(attention)),
            number(_time(attention, one.get(attention), baseline), w.milliseconds),
            _ratio(latency[attention]),
            _ratio(step[attention]),
            number(memory[attention]["median"], w.size),
            number(memory[attention]["ratio_to_fused"], w.times),
        ]
        for attention, row in accuracy.items()
    ]
    columns = ["Mechanism", "Top-1", "Parameters", "MACs [M]", "Latency × Fused, one image", "Latency, one image"]
    columns += [f"Latency × Fused{batch}", f"Training step × Fused{batch}"]
    columns += [f"Training memory{batch}", "Memory × Fused"]
    note = (
        f"Measured {w.measured_on(records(cost))}. "
        f"Ratios were timed in turns with Fused in one process; in brackets their 95{w.SPACE}% interval. Fused "
        "against itself shows the timing noise. Latency in ms: the ratio times the latency of Fused."
    )
    return Table("Accuracy and cost", columns, rows, note)


def fine_tuning(study: Study, dataset: str) -> Table | None:
    """Accuracy before and after fine-tuning from trained weights; None if no model started from any."""
    accuracy = study.of("accuracy", dataset)
    if not accuracy["val_before"].notna().any():
        return None
    rows = [
        [mechanism(row["attention"]), _percent(row["val_before"]), _percent(row["val_after"])]
        for row in records(accuracy)
    ]
    note = "Before: the trained weights with this mechanism swapped in, without training. After: the best epoch."
    return Table("Validation accuracy before and after fine-tuning", ["Mechanism", "Before", "After"], rows, note)


def _percent(share: float) -> Cell:
    return number(share, lambda x: f"{100 * x:.1f}{w.SPACE}%")


def _marked(parameters: float, fused: float | None) -> str:
    """A count, with the difference to `fused` if that is more than a tenth."""
    differs = fused and abs(parameters / fused - 1) > 0.1
    if not (differs and fused):
        return f"{parameters:,.0f}"
    return f"{parameters:,.0f} ({parameters / fused - 1:+.0%})".replace("-", w.MINUS).replace("%", f"{w.SPACE}%")


def _ratio(row: dict[str, Any] | None, runtime: str = "") -> Cell:
    return (
        Cell("–")
        if row is None
        else number(row[f"{runtime}ratio_to_fused"], lambda _: w.relative_to_fused(row, runtime))
    )


def _time(attention: str, row: dict[str, Any] | None, fused: float) -> float:
    """Times of different processes cannot be compared, so this is the ratio to `fused` times the time of `fused`."""
    if row is None or not isfinite(fused):
        return nan
    return fused if attention == "fused" else row["ratio_to_fused"] * fused


def _top1(row: dict[str, Any]) -> Cell:
    half = (row["top1_high"] - row["top1_low"]) / 2
    return Cell(
        f"{100 * row['top1']:.1f}" + (f" ± {100 * half:.1f}" if isfinite(half) else "") + f"{w.SPACE}%", row["top1"]
    )


_COSTS = [(quantity, mode) for quantity in QUANTITIES for mode in PASSES]
_LENGTHS = [f"{QUANTITIES[quantity].capitalize()}, {PASSES[mode].split(' ', 1)[1]}" for quantity, mode in _COSTS]


def efficiency_of_a_block(study: Study) -> Table:
    """From which length one attention block takes less than that of `fused`, one sample at a time."""
    rows, shortest = [], int(study.scaling["tokens"].min())
    for attention, group in one_block(study.efficiency).groupby("attention", sort=False):
        found = {(row["quantity"], row["mode"]): row for row in records(group)}
        rows.append([mechanism(str(attention)), *(_pays_off(found.get(c), shortest) for c in _COSTS)])
    note = (
        f"One attention block, one sample, {w.measured_on(records(study.scaling))}. Tokens from which it takes less "
        f"than Fused, with the 95{w.SPACE}% interval. “Only”: less between these lengths, but not at the longest. "
        f"{HOW_LENGTHS_ARE_KNOWN}."
    )
    return Table("Tokens from which a mechanism pays off", ["Mechanism", *_LENGTHS], rows, note)


def efficiency(study: Study) -> Table:
    """The same of blocks and models, one sample and batches of equal tokens, with predictions and slopes."""
    rows, shortest = [], int(study.scaling["tokens"].min())
    for key, group in study.efficiency.groupby(["scope", "batch", "attention"], sort=False):
        scope, batch, attention = map(str, key)
        found = {(row["quantity"], row["mode"]): row for row in records(group)}
        forward = found.get(_COSTS[0], {})
        rows.append(
            [
                mechanism(attention),
                text(f"{scope}, {'one sample' if batch == 'one' else 'equal tokens'}"),
                *(_pays_off(found.get(cost), shortest) for cost in _COSTS),
                number(forward.get("predicted_length", nan), partial(length_text, shortest=shortest)),
                number(forward.get("slope", nan), partial(_slope, row=forward)),
                number(forward.get("macs_slope", nan), lambda x: f"{x:.2f}"),
                _slope_range(forward),
            ]
        )
    columns = [
        "Mechanism",
        "Of",
        *_LENGTHS,
        "Time, predicted from MACs",
        "Slope of time",
        "Slope of MACs",
        "Slopes over",
    ]
    note = (
        f"Measured {w.measured_on(records(study.scaling))}. "
        f"Tokens from which a mechanism takes less than Fused, with the 95{w.SPACE}% interval. “Only”: less between "
        "these lengths, but not at the longest. Slope: exponent with which the time of the forward pass grows with "
        f"length, where its 95{w.SPACE}% interval is no wider than 1. {HOW_LENGTHS_ARE_KNOWN}."
    )
    return Table("Efficiency lengths", columns, rows, note)


def _slope(_: float, row: dict[str, Any]) -> str:
    return slope(row, 2)


def _slope_range(row: dict[str, Any]) -> Cell:
    first, last = row.get("slope_from", nan), row.get("slope_to", nan)
    return Cell(f"{first:,.0f} to {last:,.0f}", last) if isfinite(first) and isfinite(last) else Cell("–")


def _pays_off(row: dict[str, Any] | None, shortest: int) -> Cell:
    if row is None or row["attention"] == "fused" or pd.isna(row["measured_to"]):
        return Cell("–")
    if pd.notna(row["cheaper_to"]):
        first, last = row["cheaper_from"], row["cheaper_to"]
        return Cell((f"{first:,.0f} to {last:,.0f}" if first < last else f"{last:,.0f}") + " only", 1e17)
    if pd.isna(row["length"]):
        return Cell(f">{w.SPACE}{row['measured_to']:,.0f}", 1e18)  # never so far: after every length that is one
    return Cell(length_text(row["length"], shortest) + length_interval(row, shortest), row["length"])


def fidelity(study: Study, dataset: str) -> Table:
    """Error to exact attention by size, and accuracy in place of `fused`."""
    keys = ["attention", "option", "value"]
    # exact mechanisms have no size, and what is missing never equals itself
    table, kept = (study.of(name, dataset).fillna({"option": "", "value": -1}) for name in ("fidelity", "replaced"))
    errors = table.groupby([*keys, "source"], sort=False)["error"].mean().to_dict()
    replaced = kept.groupby(keys, sort=False)["top1"].mean().to_dict()
    rows = []
    for row in records(table.drop_duplicates(keys)):
        key = attention, option, value = tuple(row[k] for k in keys)
        rows.append(
            [
                mechanism(attention),
                text(f"{option} = {value:,.0f}" if option and value >= 0 else None),
                *(number(errors.get((*key, source)), w.percent) for source in ("random", "trained")),
                number(row["mixing_macs"] / 1e6, lambda x: f"{x:.3g}"),
                number(replaced.get(key), w.percent),
            ]
        )
    columns = ["Mechanism", "Size", "Error, random q, k, v", "Error, trained q, k, v", "MACs of mixing [M]"]
    columns.append("Top-1 in place of Fused")
    return Table("Fidelity to exact attention", columns, rows, "Relative Frobenius error, mean over images and heads.")


def representations(study: Study, dataset: str) -> Table:
    """Similarity to `fused`, where heads look, and the closest approximation of exact attention at lower cost."""
    cka = similarity_to_fused(study.of("cka", dataset))
    heads = study.of("heads", dataset)
    means = heads.groupby("attention", sort=False)[["distance_px", "entropy_nats"]].mean()
    errors = by_attention(closest(study.of("fidelity", dataset)))
    swapped = study.of("replaced", dataset).fillna({"option": "", "value": -1}).set_index(VARIANT)["top1"].to_dict()
    rows = []
    for a in (a for a in study.attentions if a in cka.index or a in means.index or a in errors):
        best = errors.get(a, {"option": nan, "value": nan, "error": nan})
        sized = isinstance(best["option"], str) and pd.notna(best["value"])
        key = (a, best["option"], best["value"]) if sized else (a, "", -1)
        rows.append(
            [
                mechanism(a),
                number(cka.get(a), lambda x: f"{x:.2f}"),
                number(means["distance_px"].get(a), lambda x: f"{x:.1f}"),
                number(means["entropy_nats"].get(a), lambda x: f"{x:.2f}"),
                text(f"{best['option']} = {best['value']:,.0f}" if sized else None),
                number(best["error"], w.percent),
                number(swapped.get(key) if a in errors else nan, w.percent),
            ]
        )
    columns = ["Mechanism", "Linear CKA with Fused, same layer", "Attention distance [px]", "Attention entropy [nats]"]
    columns += ["Closest cheaper size", "Error to exact attention", "Top-1 in place of Fused"]
    uniform = ""
    if len(heads):
        distance, entropy = (heads[f"uniform_{c}"].iloc[0] for c in ("distance_px", "entropy_nats"))
        uniform = f" Uniform attention: {distance:.1f} px, {entropy:.2f} nats."
    note = (
        f"Means over layers and heads.{uniform} Closest: least relative Frobenius error to exact attention among the "
        "sizes that mix with fewer multiply-adds; top-1 on validation images, without retraining."
    )
    return Table("Representations", columns, rows, note)


_RUNTIMES = {"": "PyTorch", "onnx_": "onnxruntime", "int8_": "onnxruntime, int8"}
_HARDWARE: dict[str, tuple[str, Callable[[float], str]]] = {
    "peak_rss_bytes": ("Memory, PyTorch", w.size),
    "onnx_peak_rss_bytes": ("Memory, onnxruntime", w.size),
    "int8_peak_rss_bytes": ("Memory, onnxruntime, int8", w.size),
    "peak_memory_bytes": ("Tensors, PyTorch", w.size),
    "model_bytes": ("Weights, PyTorch", w.size),
    "onnx_bytes": ("ONNX file", w.size),
    "int8_bytes": ("ONNX file, int8", w.size),
    "top1": ("Top-1", w.percent),
    "int8_top1": ("Top-1, int8", w.percent),
    "onnx_error": ("Error of ONNX", lambda x: f"{x:.1e}"),
}


def hardware_latency(study: Study, dataset: str) -> Table:
    """One thread, one image, under each runtime, relative to eager `fused`."""
    table = study.of("hardware", dataset)
    baseline = table["fused_latency_ms"].median()
    rows = [
        [
            mechanism(row["attention"]),
            *(_ratio(row, runtime) for runtime in _RUNTIMES),
            *(number(row[f"{runtime}ratio_to_fused"] * baseline, w.milliseconds) for runtime in _RUNTIMES),
        ]
        for row in records(table)
    ]
    columns = ["Mechanism", *(f"{what}, {name}" for what in ("× Fused", "Latency") for name in _RUNTIMES.values())]
    note = (
        f"One image at a time {w.measured_on(records(table))}. "
        "Ratios are to PyTorch's Fused, timed in turns with it in one process; in "
        f"brackets their 95{w.SPACE}% interval. Fused in PyTorch against itself shows the timing noise. Latency "
        f"in ms: the ratio times {w.milliseconds(baseline)}, the median latency of Fused over these processes."
    )
    return Table("Constrained hardware: latency", columns, rows, note)


def hardware(study: Study, dataset: str) -> Table:
    """Memory, size of files and accuracy under each runtime."""
    rows = [
        [mechanism(row["attention"]), *(number(row[column], show) for column, (_, show) in _HARDWARE.items())]
        for row in records(study.of("hardware", dataset))
    ]
    columns = ["Mechanism", *(label for label, _ in _HARDWARE.values())]
    note = "Memory: peak of the whole process. Tensors: peak of tensor bytes while one image is classified."
    return Table("Constrained hardware: memory, size and accuracy", columns, rows, note)


def origin(study: Study) -> Table:
    """Date, code, versions and machine of the results, one row per combination."""
    keys = ["git_revision", "effvit", "torch", "python", "platform", "device", "processor", "threads", "gpu"]
    rows = []
    for key, group in study.provenance.groupby(keys, sort=False, dropna=False):
        stages = ", ".join(dict.fromkeys(group["stage"]))
        days = sorted(set(group["time"].str[:10]))
        made = " to ".join(dict.fromkeys((days[0], days[-1])))
        rows.append([text(stages), text(made), *(text(value) for value in key)])
    columns = ["Stages", "Date", "Revision", "effvit", "PyTorch", "Python", "Platform", "Device", "Processor"]
    return Table("Origin of the results", [*columns, "Threads", "GPU"], rows)
