"""How similar the mechanisms' layers are, where their heads look, and how close each is to exact attention."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import NO_COMPARISON
from effvit.report.tables import Study, records

_EXACT = ["standard", "fused"]
_VARIANT = ["attention", "option", "value"]


def representations(study: Study, dataset: str) -> Iterator[str]:
    """Similarity to `fused`, where heads look, and how well each approximates exact attention."""
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
        yield NO_COMPARISON
        return
    other = mean.drop("standard", errors="ignore")
    listed = w.ranked(f"{w.name(str(a))} {similarity:.2f}" for a, similarity in other.items()) if len(other) else ""
    similar = f"Similarity to Fused (linear CKA, mean over layers): {listed}. " if listed else ""
    if "standard" in mean:
        retrained = mean["standard"]
        lower = w.names([str(a) for a in other[other < retrained].index]) if (other < retrained).any() else "none"
        below = f" Below that: {lower}." if listed else ""
        yield f"{similar}For scale: retraining exact attention gives {retrained:.2f}.{below}"
    else:
        yield f"{similar}There is no scale: Standard, which is exact attention trained again, was not measured."
    images = w.count(int(cka["n_images"].iloc[0]), "image")
    yield f"This is one training of each, on {images}. Other seeds may differ."


def _distances(heads: pd.DataFrame) -> Iterator[str]:
    if heads.empty:
        yield "Attention distance and entropy were not measured."
        return
    measures = {"distance": ("distance_px", "in pixels", ".1f"), "entropy": ("entropy_nats", "in nats", ".2f")}
    for name, (column, unit, digits) in measures.items():
        mean = heads.groupby("attention", sort=False)[column].mean().sort_values(kind="stable")
        listed = w.ranked(f"{w.name(str(a))} {x:{digits}}" for a, x in mean.items())
        uniform = heads[f"uniform_{column}"].iloc[0]
        yield f"Mean attention {name} over all heads, {unit}: {listed}; uniform attention: {uniform:{digits}}."


def _fidelity(fidelity: pd.DataFrame, replaced: pd.DataFrame) -> Iterator[str]:
    if fidelity.empty:
        yield "The error to exact attention was not measured."
        return
    trained = fidelity[fidelity["source"] == "trained"]
    rows = trained if len(trained) else fidelity
    rows = rows[~rows["attention"].isin(_EXACT)]
    if rows.empty:
        return
    cheaper = rows[rows["mixing_macs"] < rows["fused_macs"]]
    if cheaper.empty:
        yield "No size tried needs fewer multiply-adds than exact attention."
        return
    errors = cheaper.groupby(_VARIANT, sort=False, dropna=False)["error"].mean().reset_index()
    best = errors.sort_values("error", kind="stable").drop_duplicates("attention")
    listed = w.ranked(
        f"{w.name(row['attention'])} {w.percent(row['error'])} error{_setting(row)}" for row in records(best)
    )
    whose = "Fused's attention" if len(trained) else "exact attention on random q, k, v"
    costlier = [a for a in pd.unique(rows["attention"]) if a not in set(best["attention"])]
    none = f"; no cheaper size of {w.names(costlier)} was tried" if costlier else ""
    yield f"Best approximation of {whose} at lower cost: {listed}{none}."
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
        f"Swapped into the trained Fused model ({fused} on {w.count(rows['n_images'].iloc[0], 'image')}) without "
        f"retraining, validation accuracy at the best of these sizes is: {listed}."
    )
