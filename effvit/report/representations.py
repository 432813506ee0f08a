"""How alike the mechanisms' layers are, where their heads look, and how near each is to exact attention."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.tables import Study, records

_EXACT = ["standard", "fused"]
_VARIANT = ["attention", "option", "value"]


def representations(study: Study, dataset: str) -> Iterator[str]:
    """Similarity to `fused` beside that of the same function; where heads look; what stands in for exact attention."""
    yield from _similarity(study.of("cka", dataset))
    yield from _distances(study.of("heads", dataset))
    yield from _fidelity(study.of("fidelity", dataset), study.of("replaced", dataset))


def similarity_to_fused(cka: pd.DataFrame) -> "pd.Series[float]":
    """Linear CKA between the same layer of a mechanism and of `fused`, mean over layers, by mechanism."""
    same = cka[(cka["attention_a"] == "fused") & (cka["attention_b"] != "fused") & (cka["layer_a"] == cka["layer_b"])]
    return same.groupby("attention_b", sort=False)["cka"].mean().sort_values(kind="stable")


def _similarity(cka: pd.DataFrame) -> Iterator[str]:
    if cka.empty:
        yield "Not measured: there is no table of similarities between layers."
        return
    mean = similarity_to_fused(cka)
    if mean.empty:
        yield "There is no comparison: this needs Fused and at least one other mechanism among those selected."
        return
    other = mean.drop("standard", errors="ignore")
    listed = {str(a): f"{w.name(str(a))} {similarity:.2f}" for a, similarity in other.items()}
    if "standard" not in mean:
        yield (
            "Not known: what two trainings of the same function share, which Standard beside Fused would tell, was not "
            f"measured. Linear CKA with Fused, mean over layers: {w.ranked(listed.values())}."
        )
    else:
        less = [text for attention, text in listed.items() if other[attention] < mean["standard"]]
        rest = [text for text in listed.values() if text not in less]
        found = (
            f"less with Fused has {w.ranked(less)}" if less else "no other mechanism is shown to share less with Fused"
        )
        yield (
            "Two trainings of the same function, Standard and Fused, share a linear CKA of "
            f"{mean['standard']:.2f}, mean over layers; {found}. From one training of each, whether that would repeat "
            "is not known."
        )
        if rest:
            yield f"As much as two trainings of the same function or more: {w.ranked(rest)}."
    images = int(cka["n_images"].iloc[0])
    yield f"That is one training of each, on {w.count(images, 'image')}."


def _distances(heads: pd.DataFrame) -> Iterator[str]:
    if heads.empty:
        yield "How far the heads look was not measured."
        return
    measures = {"distance": ("distance_px", "in pixels", ".1f"), "entropy": ("entropy_nats", "in nats", ".2f")}
    for name, (column, unit, digits) in measures.items():
        mean = heads.groupby("attention", sort=False)[column].mean().sort_values(kind="stable")
        listed = w.ranked(f"{w.name(str(a))} {x:{digits}}" for a, x in mean.items())
        uniform = heads[f"uniform_{column}"].iloc[0]
        yield f"Mean attention {name} over all heads, {unit}: {listed}; uniform attention has {uniform:{digits}}."


def _fidelity(fidelity: pd.DataFrame, replaced: pd.DataFrame) -> Iterator[str]:
    if fidelity.empty:
        yield "The distance from exact attention was not measured."
        return
    trained = fidelity[fidelity["source"] == "trained"]
    rows = trained if len(trained) else fidelity
    rows = rows[~rows["attention"].isin(_EXACT)]
    if rows.empty:
        return
    cheaper = rows[rows["mixing_macs"] < rows["fused_macs"]]
    if cheaper.empty:
        yield "At no size tried does any mix with fewer multiply-adds than exact attention."
        return
    errors = cheaper.groupby(_VARIANT, sort=False, dropna=False)["error"].mean().reset_index()
    best = errors.sort_values("error", kind="stable").drop_duplicates("attention")
    listed = w.ranked(f"{w.name(row['attention'])} {w.percent(row['error'])}{_setting(row)}" for row in records(best))
    whose = "q, k, v of the trained Fused" if len(trained) else "random q, k, v"
    dearer = [a for a in pd.unique(rows["attention"]) if a not in set(best["attention"])]
    none = f"; no such size of {w.names(dearer)} was tried" if dearer else ""
    yield (
        f"Least relative error to exact attention for {whose}, among the sizes that mix with fewer multiply-adds "
        f"than it: {listed}{none}."
    )
    if len(replaced):
        yield from _replaced(replaced.merge(cheaper[_VARIANT].drop_duplicates(), on=_VARIANT))


def _setting(row: dict[str, Any]) -> str:
    return "" if pd.isna(row["option"]) or pd.isna(row["value"]) else f" ({row['option']} = {row['value']:,.0f})"


def _replaced(rows: pd.DataFrame) -> Iterator[str]:
    if rows.empty:
        return
    best = rows.sort_values("top1", ascending=False, kind="stable").drop_duplicates("attention")
    listed = w.ranked(f"{w.name(row['attention'])} {w.percent(row['top1'])}{_setting(row)}" for row in records(best))
    fused = w.percent(float(rows["top1_fused"].iloc[0]))
    yield (
        f"Put into the trained Fused ({fused} on {w.count(rows['n_images'].iloc[0], 'image')}) without training "
        f"anything, at the one of these sizes that keeps most: {listed}."
    )
