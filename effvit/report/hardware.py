"""Each mechanism on one thread, one image at a time, and with eight-bit weights."""

from collections.abc import Iterator

import pandas as pd

from effvit.deploy.rounding import rounded_up
from effvit.report import wording as w
from effvit.report.compare import cost_verdicts
from effvit.report.tables import Study, records


def constrained_hardware(study: Study, dataset: str) -> Iterator[str]:
    """From the table of exported models; what it lacks is left out."""
    rows = study.of("hardware", dataset)
    if rows.empty:
        yield "Not measured: no model was exported, quantised or timed on one thread."
        yield from _single_images(study, dataset)
        return
    yield _latency(rows)
    yield from _onnx(rows)
    yield from _int8(rows)
    yield from _memory(rows)


def _single_images(study: Study, dataset: str) -> Iterator[str]:
    cost = study.of("cost", dataset)
    rows = cost[(cost["quantity"] == "latency") & (cost["batch_size"] == 1)].dropna(subset=["ratio_to_fused"])
    if {"fused"} < set(rows["attention"]):
        yield f"Closest measurement, one image at a time {w.measured_on(records(rows))}: {_judge(rows)}"


def _judge(rows: pd.DataFrame) -> str:
    verdicts = cost_verdicts(rows)
    others = records(rows[rows["attention"] != "fused"].sort_values("ratio_to_fused", kind="stable"))
    listed = w.ranked(f"{w.name(row['attention'])} {w.relative_to_fused(row)}" for row in others)
    faster = [row["attention"] for row in others if verdicts[row["attention"]] == "cheaper"]
    judged = (
        f"{w.names(faster)} {'is' if len(faster) == 1 else 'are'} faster than Fused"
        if faster
        else "none is faster than Fused"
    )
    return f"{judged}; latency relative to Fused: {listed}."


def _latency(rows: pd.DataFrame) -> str:
    known = rows.dropna(subset=["ratio_to_fused"])
    if {"fused"} < set(known["attention"]):
        return f"One image at a time {w.measured_on(records(known))}: {_judge(known)}"
    return "Latency on one thread relative to Fused was not measured."


def _onnx(rows: pd.DataFrame) -> Iterator[str]:
    exported = rows.dropna(subset=["onnx_error"])
    missing = rows[rows["onnx_error"].isna()]
    if len(exported):
        worst = rounded_up(exported["onnx_error"].max())
        yield f"Exported to ONNX: {w.names(list(exported['attention']))}, outputs within {worst} of PyTorch's."
        yield from _relative(rows, "onnx_", "onnxruntime")
        yield from _gains(rows)
    if len(missing):
        yield f"Not exported to ONNX: {w.names(list(missing['attention']))}."


def _int8(rows: pd.DataFrame) -> Iterator[str]:
    known = rows.dropna(subset=["int8_bytes", "int8_top1"])
    if known.empty:
        yield "Eight-bit weights were not measured."
        return
    smaller = (known["int8_bytes"] / known["model_bytes"]).mean()
    fewer = ((known["top1"] - known["int8_top1"]) * known["n_images"]).round()
    worst = known[fewer == fewer.max()]
    n, split = worst["n_images"].iloc[0], worst["split"].iloc[0]
    if fewer.max() > 0:
        loses = "loses" if len(worst) == 1 else "lose"
        text = f"{w.names(list(worst['attention']))} {loses} most, {fewer.max():.0f} of {n:,} {split} images"
    else:
        text = f"none gets fewer of {n:,} {split} images right"
    yield f"An ONNX file with eight-bit weights is {w.times(smaller)} the size of PyTorch's weights; {text}."
    yield from _relative(rows, "int8_", "onnxruntime with eight-bit weights")


def _relative(rows: pd.DataFrame, prefix: str, runtime: str) -> Iterator[str]:
    known = rows.dropna(subset=[f"{prefix}ratio_to_fused"]).sort_values(f"{prefix}ratio_to_fused", kind="stable")
    if len(known):
        listed = w.ranked(f"{w.name(row['attention'])} {w.relative_to_fused(row, prefix)}" for row in records(known))
        yield f"Latency under {runtime}, relative to Fused in PyTorch: {listed}."


def _gains(rows: pd.DataFrame) -> Iterator[str]:
    gains = rows[rows["onnx_speedup_low"] > 1].sort_values("onnx_speedup", ascending=False, kind="stable")
    if len(gains):
        ends = [f"onnx_speedup{end}" for end in ("", "_low", "_high")]
        listed = w.ranked(f"{w.name(row['attention'])} {w.times(*(row[e] for e in ends))}" for row in records(gains))
        yield f"Speed relative to the same model in PyTorch: {listed}."


def _memory(rows: pd.DataFrame) -> Iterator[str]:
    runtimes = {"": "in PyTorch", "onnx_": "under onnxruntime", "int8_": "under onnxruntime with eight-bit weights"}
    ranges = {where: rows[f"{prefix}peak_rss_bytes"].dropna() for prefix, where in runtimes.items()}
    if known := [f"{_range(sizes)} {where}" for where, sizes in ranges.items() if len(sizes)]:
        yield f"Peak memory of the whole process: {w.several(known)}."
    if len(sizes := rows.set_index("attention")["peak_memory_bytes"].dropna()):
        least, most = (w.names(list(sizes[sizes == end].index)) for end in (sizes.min(), sizes.max()))
        text = f"{w.size(sizes.min())} ({least})"
        if sizes.min() < sizes.max():
            text += f" to {w.size(sizes.max())} ({most})"
        yield f"Peak memory of the tensors of one image in PyTorch: {text}."


def _range(sizes: "pd.Series[float]") -> str:
    low, high = w.size(sizes.min()), w.size(sizes.max())
    return low if low == high else f"{low} to {high}"
