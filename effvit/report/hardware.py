"""What one thread, one image at a time, and eight bits do to each mechanism."""

from collections.abc import Iterator

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import cost_verdicts
from effvit.report.tables import Study, records


def constrained_hardware(study: Study, dataset: str) -> Iterator[str]:
    """From the table of exported models; columns that it does not have are not spoken of."""
    rows = study.of("hardware", dataset)
    if rows.empty:
        yield "Not measured: no model was exported, quantised or timed on one thread."
        yield from _single_images(study, dataset)
        return
    yield _latency(rows)
    if {"onnx_latency_ms", "onnx_error"} <= set(rows):
        yield from _onnx(rows)
    if {"int8_bytes", "model_bytes", "int8_top1", "top1", "n_images"} <= set(rows):
        yield from _int8(rows)
    if "peak_memory_bytes" in rows and len(known := rows.dropna(subset=["peak_memory_bytes"])):
        least, *_, most = records(known.sort_values("peak_memory_bytes", kind="stable")) * 2
        yield (
            f"Peak memory of one image: {w.size(least['peak_memory_bytes'])} ({w.name(least['attention'])}) to "
            f"{w.size(most['peak_memory_bytes'])} ({w.name(most['attention'])})."
        )


def _single_images(study: Study, dataset: str) -> Iterator[str]:
    cost = study.of("cost", dataset)
    rows = cost[(cost["quantity"] == "latency") & (cost["batch_size"] == 1)].dropna(subset=["ratio_to_fused"])
    if {"fused"} < set(rows["attention"]):
        threads = int(study.provenance["threads"].iloc[0])
        yield f"The nearest to it, one image at a time with {w.count(threads, 'thread')}: {_judge(rows)}"


def _judge(rows: pd.DataFrame) -> str:
    verdicts = cost_verdicts(rows)
    others = records(rows[rows["attention"] != "fused"].sort_values("ratio_to_fused", kind="stable"))
    listed = w.several(f"{w.name(row['attention'])} {w.beside_fused(row)}" for row in others)
    faster = [row["attention"] for row in others if verdicts[row["attention"]] == "cheaper"]
    judged = (
        f"{w.names(faster)} {'is' if len(faster) == 1 else 'are'} faster than Fused"
        if faster
        else "none is faster than Fused"
    )
    return f"{judged}; latency beside it: {listed}."


def _latency(rows: pd.DataFrame) -> str:
    if {"ratio_to_fused", "ratio_low", "ratio_high"} <= set(rows) and rows["ratio_to_fused"].notna().sum() > 1:
        return f"One thread, one image at a time: {_judge(rows.dropna(subset=['ratio_to_fused']))}"
    if "latency_ms" in rows and len(known := rows.dropna(subset=["latency_ms"]).sort_values("latency_ms")):
        listed = w.several(f"{w.name(row['attention'])} {w.milliseconds(row['latency_ms'])}" for row in records(known))
        return f"One thread, one image at a time: {listed}; timed apart, so only large differences mean something."
    return "How fast they are on one thread was not measured."


def _onnx(rows: pd.DataFrame) -> Iterator[str]:
    exported = rows.dropna(subset=["onnx_error"])
    missing = rows[rows["onnx_error"].isna()]
    if len(exported):
        worst = exported["onnx_error"].max()
        text = f"Exported to ONNX: {w.names(list(exported['attention']))}, outputs within {worst:.0e} of PyTorch's"
        if {"onnx_speedup", "onnx_speedup_low"} <= set(rows):
            gains = exported[exported["onnx_speedup_low"] > 1].sort_values(
                "onnx_speedup", ascending=False, kind="stable"
            )
            if len(gains):
                listed = w.several(
                    f"{w.name(row['attention'])} {w.times(row['onnx_speedup'])}" for row in records(gains)
                )
                text += f"; faster there than in PyTorch: {listed}"
        yield f"{text}."
    if len(missing):
        yield f"Not exported to ONNX: {w.names(list(missing['attention']))}."


def _int8(rows: pd.DataFrame) -> Iterator[str]:
    known = rows.dropna(subset=["int8_bytes", "int8_top1"])
    if known.empty:
        yield "Eight-bit weights were not measured."
        return
    smaller = (known["int8_bytes"] / known["model_bytes"]).mean()
    fewer = ((known["top1"] - known["int8_top1"]) * known["n_images"]).round()
    worst = max(records(known.assign(fewer=fewer)), key=lambda row: row["fewer"])
    images = f"{worst.get('split', 'test')} images"
    if worst["fewer"] > 0:
        text = f"{w.name(worst['attention'])} loses most, {worst['fewer']:.0f} of {int(worst['n_images']):,} {images}"
    else:
        text = f"none gets fewer of {int(worst['n_images']):,} {images} right"
    yield f"Eight-bit weights leave {w.times(smaller)} of the file's size; {text}."
