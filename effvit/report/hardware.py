"""Each mechanism on one thread, one image at a time, and with eight-bit weights."""

from collections.abc import Iterator

import pandas as pd

from effvit.deploy.rounding import rounded_up
from effvit.report import wording as w
from effvit.report.compare import faster, faster_exported
from effvit.report.tables import Study, by_attention, records


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


def _single_images(study: Study, dataset: str) -> Iterator[str]:
    cost = study.of("cost", dataset)
    rows = cost[(cost["quantity"] == "latency") & (cost["batch_size"] == 1)].dropna(subset=["ratio_to_fused"])
    if {"fused"} < set(rows["attention"]):
        yield f"Closest measurement, one image at a time {w.measured_on(records(rows))}: {_judge(rows)}"


def _judge(rows: pd.DataFrame) -> str:
    found = [row["attention"] for row in faster(rows)]
    if not found:
        return "none is faster than Fused by a tenth or more."
    return f"{w.names(found)} {'is' if len(found) == 1 else 'are'} faster than Fused."


def _latency(rows: pd.DataFrame) -> str:
    known = rows.dropna(subset=["ratio_to_fused"])
    if {"fused"} < set(known["attention"]):
        return f"One image at a time in PyTorch {w.measured_on(records(known))}: {_judge(known)}"
    return "Latency on one thread relative to Fused was not measured."


def _onnx(rows: pd.DataFrame) -> Iterator[str]:
    exported = rows.dropna(subset=["onnx_error"])
    missing = rows[rows["onnx_error"].isna()]
    if len(exported):
        worst = rounded_up(exported["onnx_error"].max())
        yield f"Exported to ONNX: {w.names(list(exported['attention']))}, outputs within {worst} of PyTorch's."
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
    n, split = known["n_images"].iloc[0], known["split"].iloc[0]
    if fewer.max() > 0:
        text = f"it costs at most {fewer.max():.0f} of {n:,} {split} images"
    else:
        text = f"none gets fewer of {n:,} {split} images right"
    yield f"An ONNX file with eight-bit weights is {w.times(smaller)} the size of PyTorch's weights; {text}."


def _gains(rows: pd.DataFrame) -> Iterator[str]:
    gains = rows.loc[rows["onnx_speedup_low"] > 1, "onnx_speedup"]
    if len(gains):
        ends = dict.fromkeys((w.times(gains.min()), w.times(gains.max())))
        yield f"Under onnxruntime the same models run at {' to '.join(ends)} the speed of PyTorch."
    if found := faster_exported(rows):
        fastest, fused = found[0], by_attention(rows)["fused"]
        ratio = w.times(fastest["onnx_ratio_to_fused"] / fused["onnx_ratio_to_fused"])
        yield f"There {w.name(fastest['attention'])} takes least time, {ratio} that of Fused."
    elif "fused" in set(rows.loc[rows["onnx_ratio_to_fused"].notna(), "attention"]):
        yield "There none saves a tenth of the time of Fused."
