"""When a difference may be called one: an accuracy by its interval over seeds, a time by the noise of the baseline."""

from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import pandas as pd

from effvit.report.tables import Study, by_attention, records

NO_COMPARISON = "There is no comparison: it needs Fused and at least one other selected mechanism."
MARGIN = 0.01  # of accuracy: a faster mechanism is recommended where a greater loss is excluded
CONTROL = "uniform"  # mixes by no weights, and is no choice
SAME = "standard"  # the function of `fused`, whose weights it takes without loss
_EQUAL = 0.01  # exact costs (MACs, bytes) that differ by less are as good as the same
WORTH = 0.9  # of the time of `fused`: nobody changes a model to save less than a tenth


@dataclass(frozen=True)
class Accuracy:
    """A mechanism's top-1 minus `fused`'s, as fractions.

    `verdict` is better, worse, no difference shown, or one seed. `p` is that of no difference, corrected for the
    number of mechanisms: over seeds, or with one seed between the trained models, image by image.
    """

    attention: str
    difference: float
    low: float
    high: float
    verdict: str
    p: float = nan


def keeps_accuracy(compared: Accuracy) -> bool:
    """Whether a faster mechanism may be recommended: a loss of more than `MARGIN` is excluded.

    One seed excludes none; there it is enough that a loss is not likely.
    """
    if compared.verdict == "one seed":
        return not compared.high < 0
    return compared.verdict == "better" or (compared.verdict != "worse" and compared.low >= -MARGIN)


def accuracies(study: Study, dataset: str) -> list[Accuracy]:
    """Compare every mechanism with `fused`: paired over seeds where that is known, by disjoint intervals otherwise."""
    rows = by_attention(study.of("accuracy", dataset))
    fused = rows.pop("fused", None)
    if fused is None:
        return []
    paired = by_attention(study.of("paired", dataset))
    found = []
    for attention, row in rows.items():
        if pair := paired.get(attention):
            numbers = (pair["difference"], pair["difference_low"], pair["difference_high"])
            found.append(Accuracy(attention, *numbers, pair["verdict"], pair["p_holm"]))
        else:
            found.append(Accuracy(attention, row["top1"] - fused["top1"], nan, nan, _by_intervals(row, fused)))
    return found


def _by_intervals(row: dict[str, Any], fused: dict[str, Any]) -> str:
    if not all(isfinite(x) for x in (row["top1_low"], row["top1_high"], fused["top1_low"], fused["top1_high"])):
        return "one seed"
    if row["top1_low"] > fused["top1_high"]:
        return "better"
    return "worse" if row["top1_high"] < fused["top1_low"] else "no difference shown"


def cost_verdicts(rows: pd.DataFrame) -> dict[str, str]:
    """``cheaper``, ``more expensive`` or ``no difference shown`` by mechanism, without `fused` and what is unknown.

    A measured ratio counts if its interval neither contains 1 nor overlaps that of `fused` timed against itself; an
    exact one (without an interval) if it is 1 % away from 1.

    Args:
        rows: one per mechanism, with the ratio to `fused` and its interval.
    """
    table = by_attention(rows)
    own = table.pop("fused", {})
    floor, ceiling = _bounds(own, 0.0) if own else (1.0, 1.0)
    floor, ceiling = min(1.0, floor), max(1.0, ceiling)
    verdicts = {}
    for attention, row in table.items():
        if not isfinite(row["ratio_to_fused"]):
            continue
        measured = isfinite(row["ratio_low"])
        low, high = _bounds(row, _EQUAL)
        cheaper, costlier = high < (floor if measured else 1.0), low > (ceiling if measured else 1.0)
        verdicts[attention] = "cheaper" if cheaper else "more expensive" if costlier else "no difference shown"
    return verdicts


def faster(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows shown to take at most 0.9 of the time of `fused`, by the upper end of their interval, and beyond its noise.

    The fastest first, without the control.
    """
    verdicts = cost_verdicts(rows)
    known = rows[rows["attention"] != CONTROL].sort_values("ratio_to_fused", kind="stable")
    return [r for r in records(known) if verdicts.get(r["attention"]) == "cheaper" and _bounds(r, 0.0)[1] <= WORTH]


def faster_exported(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The same under onnxruntime, where `fused` is exported as well: with intervals apart from its own there.

    Args:
        rows: one per mechanism, of the table `hardware`.
    """
    known = rows[rows["attention"] != CONTROL].dropna(subset=["onnx_ratio_to_fused"])
    ranked = records(known.sort_values("onnx_ratio_to_fused", kind="stable"))
    fused = by_attention(known).get("fused")
    return [r for r in ranked if fused and _saves_a_tenth(r, fused)]


def _saves_a_tenth(row: dict[str, Any], fused: dict[str, Any]) -> bool:
    apart = row["onnx_ratio_high"] < fused["onnx_ratio_low"]
    return bool(apart and row["onnx_ratio_high"] <= WORTH * fused["onnx_ratio_to_fused"])


def _bounds(row: dict[str, Any], margin: float) -> tuple[float, float]:
    if isfinite(row["ratio_low"]) and isfinite(row["ratio_high"]):
        return row["ratio_low"], row["ratio_high"]
    ratio = row["ratio_to_fused"] if isfinite(row["ratio_to_fused"]) else 1.0
    return ratio * (1 - margin), ratio * (1 + margin)


def at_largest_batch(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One row per mechanism: the quantity at the largest batch measured."""
    found = rows[rows["quantity"] == quantity].sort_values("batch_size", kind="stable")
    order = pd.unique(rows["attention"])
    return found.drop_duplicates("attention", keep="last").set_index("attention").reindex(order).reset_index()
