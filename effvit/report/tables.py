"""The tables of a study, read back: what must be there, what may be absent, and of what type it is."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from effvit.errors import UserError

_TEXT = {
    *("dataset", "attention", "attention_a", "attention_b", "actual", "predicted", "quantity", "unit", "mode"),
    *("scope", "batch", "status", "source", "option", "branch", "verdict", "stage", "git_revision", "python"),
    *("platform", "cpu", "accelerator", "effvit", "torch"),
}
_RATIO = ["ratio_to_fused", "ratio_low", "ratio_high"]
_EXPECTED: dict[str, list[str]] = {
    "accuracy": ["dataset", "attention", "n_seeds", "top1", "top1_low", "top1_high", "parameters", "gmacs"],
    "cost": ["dataset", "attention", "quantity", "batch_size", "unit", "median", *_RATIO],
    "tradeoff": ["dataset", "attention", "top1", "gmacs", "batch_size", "latency_ratio", "train_memory_mib"],
    "scaling": ["attention", "tokens", "mode", "quantity", "unit", "median", *_RATIO, "status"],
    "confusion": ["dataset", "attention", "actual", "predicted", "count"],
    "curves": ["dataset", "attention", "seed", "epoch", "val_accuracy"],
    "provenance": ["stage", "git_revision", "python", "platform", "cpu", "threads", "accelerator", "effvit", "torch"],
    "paired": ["dataset", "attention", "n_seeds", "difference", "difference_low", "difference_high", "verdict"],
    "efficiency": [
        *("attention", "scope", "batch", "mode", "quantity", "length", "cheaper_from", "cheaper_to", "measured_to"),
        *("slope", "slope_from", "slope_to"),
    ],
    "fidelity": ["dataset", "attention", "source", "option", "value", "error", "mixing_macs"],
    "replaced": ["dataset", "attention", "option", "value", "top1", "top1_fused", "n_images"],
    "cka": ["dataset", "attention_a", "layer_a", "attention_b", "layer_b", "cka", "n_images"],
    "heads": ["dataset", "attention", "layer", "distance_px", "entropy_nats"],
    "gates": ["dataset", "attention", "layer", "branch", "share"],
    "hardware": ["dataset", "attention"],
}


@dataclass(frozen=True)
class Study:
    """One frame a table, with at least the columns named above; optional ones without rows where nothing is known."""

    accuracy: pd.DataFrame
    cost: pd.DataFrame
    tradeoff: pd.DataFrame
    scaling: pd.DataFrame
    confusion: pd.DataFrame
    curves: pd.DataFrame
    provenance: pd.DataFrame
    paired: pd.DataFrame
    efficiency: pd.DataFrame
    fidelity: pd.DataFrame
    replaced: pd.DataFrame
    cka: pd.DataFrame
    heads: pd.DataFrame
    gates: pd.DataFrame
    hardware: pd.DataFrame

    @property
    def datasets(self) -> list[str]:
        """Names in the order of the study."""
        return list(pd.unique(self.accuracy["dataset"]))

    @property
    def attentions(self) -> list[str]:
        """Mechanisms in the order of the study."""
        return list(pd.unique(self.accuracy["attention"]))

    def test_images(self, dataset: str) -> int:
        """Images of the test split."""
        counts = self.confusion[self.confusion["dataset"] == dataset].groupby("attention", sort=False)["count"].sum()
        seeds = self.accuracy[self.accuracy["dataset"] == dataset].set_index("attention")["n_seeds"]
        return int(counts.iloc[0] // seeds[counts.index[0]])

    def of(self, table: str, dataset: str) -> pd.DataFrame:
        """The rows of one data set."""
        frame: pd.DataFrame = getattr(self, table)
        return frame[frame["dataset"] == dataset]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows in their order, each by column."""
    return [{str(column): value for column, value in row.items()} for row in frame.to_dict("records")]


def by_attention(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The row of each mechanism, which has one."""
    return {row["attention"]: row for row in records(frame)}


_OPTIONAL = ("paired", "efficiency", "fidelity", "replaced", "cka", "heads", "gates", "hardware")


def read(data_dir: Path) -> Study:
    """Read what `effvit aggregate` wrote.

    Raises:
        UserError: a table that every study has is missing or empty, or any table lacks a column.
    """
    study = Study(**{field.name: _read(data_dir / f"{field.name}.csv", field.name) for field in fields(Study)})
    if "scope" not in study.scaling:  # one block, one sample: what was measured before there was a choice
        study.scaling.insert(1, "scope", "block")
    if "batch" not in study.scaling:
        study.scaling.insert(2, "batch", "one")
    return study


def _read(path: Path, table: str) -> pd.DataFrame:
    expected, optional = _EXPECTED[table], table in _OPTIONAL
    if optional and not path.exists():
        return pd.DataFrame(columns=expected)
    try:
        # a class may well be called "nan"; an empty field alone is a missing value
        frame = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False, na_values=[""])
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; `dvc repro aggregate` makes it") from error
    except ValueError as error:
        raise UserError(f"{path}: not a table; `dvc repro -f aggregate` makes it anew") from error
    missing = [column for column in expected if column not in frame]
    if missing or (frame.empty and not optional):
        problem = f"lacks {', '.join(missing)}" if missing else "no rows"
        raise UserError(f"{path}: {problem}; `dvc repro -f aggregate` makes it anew")
    return frame
