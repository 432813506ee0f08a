"""The report's first table: which mechanism to take, by what one has."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import MARGIN, SAME, accuracies, faster, faster_exported, keeps_accuracy
from effvit.report.overview import Cell, Table
from effvit.report.tables import Study, by_attention, records

_COLUMNS = ["Tokens", "Device", "May you retrain?", "Take", "Time × Fused", "Accuracy, points to Fused", "How sure"]
_FUSED = "fused"


@dataclass(frozen=True)
class _Pick:
    attention: str
    row: dict[str, Any]  # of the table of times


def which_one(study: Study) -> Table:
    """A row for each run of lengths with the same answer, one for trained models, and one for onnxruntime.

    Another mechanism than `fused` is taken where it saves at least a tenth of the time, beyond the noise, and keeps the
    accuracy on every data set, see `keeps_accuracy`; of several the fastest.
    """
    rows = [row for make in (_by_length, _without_retraining, _exported) for row in make(study)]
    measured = records(study.scaling) + records(study.hardware)
    note = (
        "Fused unless another saves at least a tenth of the time, beyond the noise, and a loss of more than "
        f"{100 * MARGIN:.0f} point of accuracy is excluded; with one seed, which excludes none, no loss is likely. "
        "Accuracy is that of the models trained for each data set, also where other lengths were timed. "
        f"In brackets: 95{w.SPACE}% intervals. Time: one image through the whole model, measured "
        f"{w.measured_on(measured)}."
    )
    return Table("Which one?", _COLUMNS, [[Cell(text) for text in row] for row in rows], note)


def _by_length(study: Study) -> Iterator[list[str]]:
    times = _times(study.scaling)
    lost = _less_accurate(study) - {SAME}
    picks = []
    for tokens, at in times.groupby("tokens"):
        if _FUSED in set(at["attention"]):
            found = [r for r in faster(at) if r["attention"] not in lost]
            picks.append((int(str(tokens)), _Pick(found[0]["attention"], found[0]) if found else _Pick(_FUSED, {})))
    for attention, run in groupby(picks, key=lambda pick: pick[1].attention):
        of_run = list(run)
        ends = of_run if len(of_run) == 1 else [of_run[0], of_run[-1]]
        lengths = " to ".join(f"{tokens:,}" for tokens, _ in ends)
        ratios = " to ".join(w.times(pick.row["ratio_to_fused"]) for _, pick in ends if pick.row)
        yield [
            lengths,
            _device(times),
            _retrain(attention),
            w.name(attention),
            ratios or "1",
            *_accuracy(study, attention, " at its number of tokens"),
        ]


def _times(scaling: pd.DataFrame) -> pd.DataFrame:
    """Forward times of the whole model, one image at a time, that no other program disturbed."""
    known = (scaling["mode"] == "forward") & (scaling["quantity"] == "time") & (scaling["batch"] == "one")
    rows = scaling[known & (scaling["scope"] == "model") & (scaling["status"] == "ok") & ~scaling["contended"]]
    return rows.dropna(subset=["ratio_to_fused"])


def _less_accurate(study: Study) -> set[str]:
    compared = [b for dataset in study.datasets for b in accuracies(study, dataset)]
    return {b.attention for b in compared if not keeps_accuracy(b)}


def _retrain(attention: str) -> str:
    return "no need" if attention == SAME else "yes"


def _accuracy(study: Study, attention: str, where: str = "") -> tuple[str, str]:
    """What the mechanism gives, by data set, and how far that is known and ``where``."""
    if attention == _FUSED:
        return "0", "the baseline"
    if attention == SAME:
        return "0", f"the function of {w.name(_FUSED)}, with its weights"
    given, known = [], []
    for dataset in study.datasets:
        rows = by_attention(study.of("accuracy", dataset))
        for b in (b for b in accuracies(study, dataset) if b.attention == attention):
            interval = f" ({w.points(b.low)} to {w.points(b.high)})" if isfinite(b.low) else ""
            given.append(f"{dataset} {w.points(b.difference)}{interval}")
            seeds = int(rows[attention]["n_seeds"])
            verdict = "" if b.verdict == "one seed" else f", {b.verdict}"
            known.append(f"{dataset}: {w.count(seeds, 'seed')}{verdict}{where}")
    return "; ".join(given) or "not measured", "; ".join(known) or "accuracy not measured"


def _without_retraining(study: Study) -> Iterator[list[str]]:
    for dataset in study.datasets:
        cost, replaced = study.of("cost", dataset), study.of("replaced", dataset)
        times = cost[(cost["quantity"] == "latency") & (cost["batch_size"] == 1)].dropna(subset=["ratio_to_fused"])
        if replaced.empty or _FUSED not in set(times["attention"]):
            continue
        # Timed at the size that was trained: what keeps accuracy at every size does so there.
        least = replaced.groupby("attention")["top1"].min()
        fused, images = replaced["top1_fused"].iloc[0], int(replaced["n_images"].iloc[0])
        found = [r for r in faster(times) if least.get(r["attention"], 0.0) >= fused - MARGIN]
        pick = _Pick(found[0]["attention"], found[0]) if found else _Pick(_FUSED, {})
        swapped = w.points(least[pick.attention] - fused) if found else "0"
        sure = f"{dataset}: {w.count(images, 'validation image')}, one model"
        ratio = w.times(pick.row["ratio_to_fused"]) if found else "1"
        yield [f"those of {dataset}", _device(times), "no", w.name(pick.attention), ratio, swapped, sure]


def _exported(study: Study) -> Iterator[list[str]]:
    for dataset in study.datasets:
        rows = study.of("hardware", dataset).dropna(subset=["onnx_ratio_to_fused"])
        known = by_attention(rows)
        if _FUSED not in known:
            continue
        lost = _less_accurate(study) - {SAME}
        found = [r for r in faster_exported(rows) if r["attention"] not in lost]
        pick = found[0] if found else known[_FUSED]
        what = [
            _retrain(pick["attention"]),
            w.name(pick["attention"]),
            f"{w.times(pick['onnx_ratio_to_fused'])} of {w.name(_FUSED)} in PyTorch",
        ]
        yield [f"those of {dataset}", _device(rows, "onnxruntime"), *what, *_accuracy(study, pick["attention"])]


def _device(rows: pd.DataFrame, runtime: str = "PyTorch") -> str:
    places = rows[["machine", "threads"]].drop_duplicates().itertuples(index=False, name=None)
    return f"{runtime}, {w.several(w.count(n, 'thread') if n > 0 else machine for machine, n in places)}"
