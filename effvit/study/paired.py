"""Each mechanism's accuracy compared with ``fused``: the study's paired comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from effvit.analysis.paired import LEVEL, Difference, between_models, holm, over_seeds
from effvit.errors import UserError

Predictions = Mapping[tuple[str, str, int], pd.DataFrame]
"""Rows `index`, `label`, `prediction` of the test images, by data set, mechanism and seed."""

_BASELINE = "fused"
_COLUMNS = ["dataset", "attention", "n_seeds", "n_images", "difference", "difference_low", "difference_high"]
_COLUMNS += ["p", "p_holm", "test", "of", "verdict"]


def compare_to_fused(
    predictions: Predictions, datasets: Sequence[str], attentions: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    """Differences of top-1 to ``fused``, one row per data set and other mechanism; no rows where fused is not there.

    With several seeds, differences are paired by seed, and speak of the mechanisms; with one seed, by test image, and
    speak of two trained models alone. `p_holm` corrects for comparing all mechanisms of the data set with one `fused`;
    a verdict of `better` or `worse` needs several seeds and `p_holm` below 5 %, which implies that the interval
    excludes 0.

    Raises:
        UserError: predictions of other images than those of ``fused``.
    """
    rows: list[dict[str, Any]] = []
    for dataset in datasets if _BASELINE in attentions else ():
        of_dataset: list[dict[str, Any]] = []
        for attention in (a for a in attentions if a != _BASELINE):
            pairs = [_paired(predictions, dataset, attention, seed) for seed in seeds]
            found = between_models(*pairs[0]) if len(seeds) == 1 else over_seeds(*_accuracies(pairs))
            of_dataset.append(_row(dataset, attention, found, len(seeds), len(pairs[0][0])))
        adjusted = holm([row["p"] for row in of_dataset])
        for row, p in zip(of_dataset, adjusted, strict=True):
            rows.append(row | {"p_holm": p, "verdict": _verdict(row["difference"], p, len(seeds))})
    return pd.DataFrame(rows, columns=_COLUMNS)


def _paired(predictions: Predictions, dataset: str, attention: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    mine, fused = (predictions[dataset, name, seed] for name in (attention, _BASELINE))
    if not mine[["index", "label"]].equals(fused[["index", "label"]]):
        raise UserError(
            f"{dataset}, seed {seed}: {attention} and {_BASELINE} were evaluated on other images; "
            "`dvc repro -f evaluate` evaluates both anew"
        )
    mine_right, fused_right = ((table["label"] == table["prediction"]).to_numpy() for table in (mine, fused))
    return mine_right, fused_right


def _accuracies(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[float], list[float]]:
    return [float(mine.mean()) for mine, _ in pairs], [float(fused.mean()) for _, fused in pairs]


def _row(dataset: str, attention: str, found: Difference, n_seeds: int, n_images: int) -> dict[str, Any]:
    several = n_seeds > 1
    return {
        "dataset": dataset,
        "attention": attention,
        "n_seeds": n_seeds,
        "n_images": n_images,
        "difference": found.difference,
        "difference_low": found.low,
        "difference_high": found.high,
        "p": found.p,
        "test": "paired t over seeds" if several else "McNemar, exact",
        "of": "mechanisms" if several else "these two trained models, not the mechanisms",
    }


def _verdict(difference: float, p: float, n_seeds: int) -> str:
    if n_seeds == 1:
        return "one seed"
    if not p < 1 - LEVEL:  # NaN is no evidence either
        return "no difference shown"
    return "better" if difference > 0 else "worse"
