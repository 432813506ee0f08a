"""The tables of a study, read back: what must be there, what may be absent, and of what type and range it is."""

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd

from effvit.errors import UserError
from effvit.study.cells import read_csv

_KEY = {"dataset": str, "attention": str}
_CASE = dict.fromkeys(("attention", "scope", "batch", "mode", "quantity"), str)
_MACHINE = {"machine": str, "threads": float, "dtype": str}  # no threads where a GPU computed
_RATIO = dict.fromkeys(("ratio_to_fused", "ratio_low", "ratio_high"), float)
_LENGTHS = (
    *("length", "length_low", "length_high", "predicted_length", "cheaper_from", "cheaper_to", "measured_to"),
    *("slope_from", "slope_to"),
)
_RUNTIMES = ("", "onnx_", "int8_")
_COLUMNS: dict[str, dict[str, Any]] = {
    "accuracy": _KEY
    | dict.fromkeys(("n_seeds", "n_images", "parameters"), int)
    | dict.fromkeys(("top1", "top1_low", "top1_high", "gmacs", "val_before", "val_after"), float),
    "cost": _KEY | _MACHINE | {"quantity": str, "batch_size": float, "median": float} | _RATIO,
    "tradeoff": _KEY | dict.fromkeys(("top1_images_low", "top1_images_high"), float),
    "scaling": _CASE | _MACHINE | {"tokens": int, "median": float} | _RATIO | {"status": str, "contended": bool},
    "confusion": _KEY | {"actual": str, "predicted": str, "count": int},
    "curves": _KEY | {"epoch": int},
    "provenance": dict.fromkeys(
        ("stage", "time", "git_revision", "python", "platform", "device", "processor", "gpu", "effvit", "torch"), str
    )
    | {"threads": int},
    "paired": _KEY
    | dict.fromkeys(("difference", "difference_low", "difference_high", "p_holm"), float)
    | {"verdict": str},
    "efficiency": _CASE
    | dict.fromkeys(_LENGTHS, float)
    | dict.fromkeys(("slope", "slope_low", "slope_high", "macs_slope"), float),
    "fidelity": _KEY
    | {"source": str, "option": str, "value": float, "error": float, "mixing_macs": int, "fused_macs": int},
    "replaced": _KEY | {"option": str, "value": float, "top1": float, "top1_fused": float, "n_images": int},
    "cka": {"dataset": str, "attention_a": str, "layer_a": int, "attention_b": str, "layer_b": int}
    | {"cka": float, "n_images": int},
    "heads": _KEY
    | {"layer": int}
    | {start + name: float for start in ("", "uniform_") for name in ("distance_px", "entropy_nats")},
    "gates": _KEY | {"layer": int, "branch": str, "share": float},
    "hardware": _KEY
    | _MACHINE
    | {"split": str, "n_images": int, "fused_latency_ms": float}
    | {runtime + column: float for runtime in _RUNTIMES for column in (*_RATIO, "peak_rss_bytes")}
    | {f"{r}speedup{end}": float for r in _RUNTIMES[1:] for end in ("", "_low", "_high")}
    | dict.fromkeys(("model_bytes", "onnx_bytes", "int8_bytes", "peak_memory_bytes"), float)
    | dict.fromkeys(("top1", "int8_top1", "onnx_error"), float),
}
_OPTIONAL = ("paired", "efficiency", "fidelity", "replaced", "cka", "heads", "gates", "hardware")
_MAY_LACK = ("replaced", "gates", "provenance")  # mechanisms: without `fused`, without a gate, of whole data sets
_OF_STUDY = ("scaling", "efficiency")
_ONE_ROW = ("accuracy", "tradeoff", "paired", "hardware")  # a mechanism
_KNOWN = {
    *("dataset", "attention", "attention_a", "attention_b", "quantity", "scope", "batch", "mode", "status"),
    *("actual", "predicted", "verdict", "source", "branch", "split", "stage", "time", "top1", "gmacs", "difference"),
    *("machine", "dtype", "device", "processor"),
    *("error", "top1_fused", "cka", "distance_px", "entropy_nats", "share", "fused_latency_ms", "model_bytes"),
}
_POSITIVE = {
    *("n_seeds", "n_images", "parameters", "gmacs", "batch_size", "tokens", "epoch", "threads", "value", "mixing_macs"),
    *("fused_macs", "fused_latency_ms", "peak_memory_bytes", "median", "model_bytes"),
    *_LENGTHS,
    *(runtime + column for runtime in _RUNTIMES for column in (*_RATIO, "peak_rss_bytes", "bytes", "speedup")),
}
_FRACTIONS = {"top1", "top1_fused", "int8_top1", "share", "p_holm", "top1_images_low", "top1_images_high"}


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
        return int(self.of("accuracy", dataset)["n_images"].iloc[0])

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


def read(data_dir: Path) -> Study:
    """Read what `effvit aggregate` wrote, and verify it: what is returned, every part of the report can be made of.

    Raises:
        UserError: a table that every study has is missing or empty; any table lacks a column or a mechanism, or has a
            cell that cannot be.
    """
    paths = {field.name: data_dir / f"{field.name}.csv" for field in fields(Study)}
    tables = {table: _read(path, table) for table, path in paths.items()}
    for table, frame in tables.items():
        if table not in _MAY_LACK and not (frame.empty and table in _OPTIONAL):
            _refuse_missing(paths[table], table, frame, tables["accuracy"])
    return Study(**tables)


def _refuse_missing(path: Path, table: str, frame: pd.DataFrame, accuracy: pd.DataFrame) -> None:
    """Every mechanism whose accuracy is known must have a row; `fused` is not paired with itself."""
    key = ["attention"] if table in _OF_STUDY else list(_KEY)
    wanted = accuracy[accuracy["attention"] != "fused"] if table == "paired" else accuracy
    for name in (column for column in frame if str(column).startswith("attention")):
        there = set(frame[[*key[:-1], name]].itertuples(index=False, name=None))
        for row in wanted[key].itertuples(index=False, name=None):
            if row not in there:
                of = f" of {row[0]}" if len(row) > 1 else ""
                raise _malformed(path, f"no row{of} with {name} {row[-1]}, which accuracy.csv has")


def _read(path: Path, table: str) -> pd.DataFrame:
    columns, optional = _COLUMNS[table], table in _OPTIONAL
    if optional and not path.exists():
        return pd.DataFrame(columns=list(columns))
    frame = read_csv(path, "aggregate", columns, may_be_empty=optional)
    for column, kind in columns.items():
        values = frame[column]
        _refuse(path, values, values.isna() & (column in _KNOWN), "something")
        if kind is not str:
            _refuse(path, values, values.abs() == inf, "a finite number")
        if column in _POSITIVE:
            _refuse(path, values, values <= 0, "more than 0")
        if column in _FRACTIONS:
            _refuse(path, values, (values < 0) | (values > 1), "0 to 1")
    if table == "cost":  # that of the whole process has no batch
        batched = frame["quantity"].isin(["latency", "train_step", "train_memory"])
        _refuse(path, frame["batch_size"], batched & frame["batch_size"].isna(), "the batch of this quantity")
    if table in _ONE_ROW:
        again = frame.duplicated(list(_KEY))
        _refuse(path, frame["attention"], again, "one row of each mechanism and data set")
    return frame


def _refuse(path: Path, values: "pd.Series[Any]", wrong: "pd.Series[bool]", expected: str) -> None:
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        value = values.iloc[row]
        found = "empty" if pd.isna(value) else value
        raise _malformed(path, f"line {row + 2}, {values.name}: {found}, expected {expected}")


def _malformed(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; `dvc repro -f aggregate` makes it anew")
