"""How alike the mechanisms' layers are, where their heads look, and how near each is to exact attention."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.tables import Study, records


def representations(study: Study, dataset: str) -> Iterator[str]:
    """Similarity to `fused` layer by layer, attention distance, error and accuracy in the place of `fused`."""
    yield from _similarity(study.of("cka", dataset))
    yield from _distances(study.of("heads", dataset))
    yield from _fidelity(study.of("fidelity", dataset))
    yield from _replaced(study.of("replaced", dataset))


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
    if len(other) > 1:
        least, most = str(other.index[0]), str(other.index[-1])
        yield (
            f"The layers of {w.name(least)} are the least like those of Fused (linear CKA {other.iloc[0]:.2f}, mean "
            f"over layers), those of {w.name(most)} the most ({other.iloc[-1]:.2f})."
        )
    elif len(other):
        yield f"Linear CKA between {w.name(str(other.index[0]))} and Fused is {other.iloc[0]:.2f}, mean over layers."
    if "standard" in mean:
        yield f"Standard, which computes what Fused computes, has {mean['standard']:.2f}."
    images = int(cka["n_images"].iloc[0])
    yield f"These describe one training of each, on {w.count(images, 'image')}: how another would differ is not known."


def _distances(heads: pd.DataFrame) -> Iterator[str]:
    if heads.empty:
        yield "How far the heads look was not measured."
        return
    mean = heads.groupby("attention", sort=False)[["distance_px", "entropy_nats"]].mean()
    far = mean["distance_px"].sort_values(kind="stable")
    listed = w.several(f"{w.name(str(a))} {d:.1f}" for a, d in far.items())
    yield f"Mean attention distance over all heads, in pixels: {listed}."


def _fidelity(fidelity: pd.DataFrame) -> Iterator[str]:
    if fidelity.empty:
        yield "The distance from exact attention was not measured."
        return
    trained = fidelity[fidelity["source"] == "trained"]
    rows = trained if len(trained) else fidelity
    exact = ["standard", "fused"]
    mean = rows[~rows["attention"].isin(exact)].groupby(["attention", "option", "value"], sort=False, dropna=False)
    errors = mean["error"].mean().reset_index()
    if errors.empty:
        return
    best = errors.sort_values("error", kind="stable").drop_duplicates("attention")
    listed = w.several(f"{w.name(row['attention'])} {w.percent(row['error'])}{_setting(row)}" for row in records(best))
    whose = "q, k, v of the trained Fused" if len(trained) else "random q, k, v"
    yield f"Least relative error to exact attention for {whose}, over the sizes tried: {listed}."


def _setting(row: dict[str, Any]) -> str:
    return "" if pd.isna(row["option"]) or pd.isna(row["value"]) else f" ({row['option']} = {row['value']:,.0f})"


def _replaced(replaced: pd.DataFrame) -> Iterator[str]:
    rows = replaced[~replaced["attention"].isin(["standard", "fused"])]
    if rows.empty:
        return
    best = rows.sort_values("top1", ascending=False, kind="stable").drop_duplicates("attention")
    listed = w.several(f"{w.name(row['attention'])} {w.percent(row['top1'])}{_setting(row)}" for row in records(best))
    fused = w.percent(float(rows["top1_fused"].iloc[0]))
    yield (
        f"Put into the trained Fused ({fused} on {w.count(rows['n_images'].iloc[0], 'image')}) without training "
        f"anything, at the size that keeps most: {listed}."
    )
