"""How similar the mechanisms' layers are, and how close each is to exact attention."""

from collections.abc import Iterator

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import MARGIN, NO_COMPARISON
from effvit.report.tables import Study

_EXACT = ["standard", "fused"]
VARIANT = ["attention", "option", "value"]


def representations(study: Study, dataset: str) -> Iterator[str]:
    """Similarity to `fused` and, without retraining, what is left of its accuracy with another mechanism."""
    yield from _similarity(study.of("cka", dataset))
    yield from _replaced(study.of("fidelity", dataset), study.of("replaced", dataset))


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
    if "standard" in mean:
        retrained, other = mean["standard"], mean.drop("standard")
        ends = f", from {_similar(other, 0)} to {_similar(other, -1)}" if len(other) > 1 else f": {_similar(other, 0)}"
        yield (
            f"With one training of each this is no ranking: linear CKA with Fused, mean over layers{ends}; exact "
            f"attention trained again has {retrained:.2f}."
            if len(other)
            else f"Exact attention trained again has a linear CKA of {retrained:.2f} with Fused, mean over layers."
        )
    else:
        yield "There is no scale: Standard, which is exact attention trained again, was not measured."
    images = w.count(int(cka["n_images"].iloc[0]), "image")
    yield f"Compared on {images}. Other seeds may differ."


def _similar(mean: "pd.Series[float]", place: int) -> str:
    return f"{mean.iloc[place]:.2f} ({w.name(str(mean.index[place]))})"


def closest(fidelity: pd.DataFrame) -> pd.DataFrame:
    """Of each approximate mechanism the size with the lowest error among those cheaper than exact attention.

    On the trained model's q, k, v, or on random ones where there is no trained model; errors are means over layers.
    """
    trained = fidelity[fidelity["source"] == "trained"]
    rows = trained if len(trained) else fidelity
    rows = rows[~rows["attention"].isin(_EXACT) & (rows["mixing_macs"] < rows["fused_macs"])]
    errors = rows.groupby(VARIANT, sort=False, dropna=False)["error"].mean().reset_index()
    return errors.sort_values("error", kind="stable").drop_duplicates("attention")


def _replaced(fidelity: pd.DataFrame, replaced: pd.DataFrame) -> Iterator[str]:
    cheaper = fidelity[~fidelity["attention"].isin(_EXACT) & (fidelity["mixing_macs"] < fidelity["fused_macs"])]
    rows = replaced.merge(cheaper[VARIANT].drop_duplicates(), on=VARIANT)
    if rows.empty:
        return
    best = rows.sort_values("top1", ascending=False, kind="stable").drop_duplicates("attention")
    fused = float(rows["top1_fused"].iloc[0])
    kept = [str(a) for a in best.loc[best["top1"] >= fused - MARGIN, "attention"]]
    where = f"(top-1 {w.percent(fused)} on {w.count(rows['n_images'].iloc[0], 'image')})"
    keep = f"{w.names(kept)} {'keeps' if len(kept) == 1 else 'keep'}" if kept else "no mechanism keeps"
    yield (
        f"Swapped into the trained Fused model {where} without retraining, at a size that mixes with fewer "
        f"multiply-adds, {keep} its accuracy to within {100 * MARGIN:.0f} point."
    )
