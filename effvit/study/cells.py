"""Readers of what the stages write about one cell; errors in a file name the stage that makes it."""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file

from effvit.errors import UserError

_RATIO = ["ratio_to_fused", "ratio_low", "ratio_high"]
_MEASURED = {"quantity": str, "unit": str} | dict.fromkeys(["median", "q25", "q75", *_RATIO], float)
_WAY = {"precision": str, "execution": str}  # of which the first is shown; `measured_on` has its names
_HISTORY = ["epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy"]
_ENVIRONMENT = ["time", "git_revision", "python", "platform"]
_MACHINE = ["device", "processor", "threads", "gpu"]
_RUNTIMES = ("", "onnx_", "int8_")  # PyTorch, onnxruntime, onnxruntime with int8 weights
_TIMES = ["latency_ms", "latency_q25", "latency_q75", *_RATIO]
_SPEEDUP = ["speedup", "speedup_low", "speedup_high"]
_DEPLOYMENT = [
    *("split", "n_images", "model_bytes", "onnx_bytes", "int8_bytes", "top1", "onnx_top1", "int8_top1"),
    *("int8_lost", "int8_gained", "onnx_error", "onnx_status", "int8_status"),
]
_HARDWARE = [
    *("fused_latency_ms", "n_rounds"),
    *(runtime + column for runtime in _RUNTIMES for column in _TIMES),
    *(runtime + column for runtime in _RUNTIMES[1:] for column in _SPEEDUP),
    *("weight_bytes", "peak_memory_bytes", *(f"{runtime}peak_rss_bytes" for runtime in _RUNTIMES)),
]
_FIDELITY = {"attention": str, "source": str, "option": str, "value": "Int64", "layer": "Int64"}
_REPLACED = {"attention": str, "option": str, "value": "Int64", "top1": float, "top1_fused": float, "n_images": int}
_CKA = {"attention_a": str, "layer_a": int, "attention_b": str, "layer_b": int, "cka": float, "n_images": int}
_HEADS = {"attention": str, "layer": int, "head": int} | dict.fromkeys(
    ("distance_px", "entropy_nats", "uniform_distance_px", "uniform_entropy_nats"), float
)
_GATES = {"attention": str, "layer": int, "branch": str, "share": float}
_UNREADABLE = (ValueError, TypeError, OverflowError)  # what pandas raises of a file that is no such table
_KINDS = {int: "a whole number", "Int64": "a whole number or nothing", float: "a number", bool: "True or False"}
_MAPS = {"images": 4, "labels": 1, "predictions": 1, "maps": 3}  # number of dimensions


def history(directory: Path) -> pd.DataFrame:
    """Learning curves, one row per epoch."""
    return read_csv(directory / "history.csv", "train", dict.fromkeys(_HISTORY, float) | {"epoch": int})


def accuracy_before(directory: Path) -> float:
    """Validation accuracy of a model that starts from trained weights, before training; NaN for a random start."""
    if not (directory / "start.json").exists():
        return float("nan")
    return _read_json(directory / "start.json", "train", ["val_accuracy_before"])["val_accuracy_before"]


def confusion(directory: Path) -> pd.DataFrame:
    """Counts of test images by actual and predicted class."""
    return read_csv(directory / "confusion.csv", "evaluate", {"actual": str, "predicted": str, "count": int})


def predictions(directory: Path) -> pd.DataFrame:
    """Class of each test image and class it was taken for, as numbers."""
    return read_csv(directory / "predictions.csv", "evaluate", dict.fromkeys(("index", "label", "prediction"), int))


def attention_maps(directory: Path) -> dict[str, np.ndarray]:
    """`images` (n, H, W, 3) uint8, `labels` and `predictions` (n,) int64, `maps` (n, gh, gw) float32."""
    path = directory / "attention_maps.safetensors"
    arrays = _load_arrays(path, "evaluate")
    shapes = {name: arrays[name].ndim for name in _MAPS if name in arrays}
    if shapes != _MAPS or len({len(arrays[name]) for name in _MAPS}) != 1 or not len(arrays["images"]):
        raise _malformed(path, "evaluate", f"expected {', '.join(_MAPS)} of the same images")
    return arrays


def evaluation(directory: Path) -> dict[str, float]:
    """Test accuracies, fractions 0..1, and the number of images."""
    return _read_json(directory / "evaluation.json", "evaluate", ["top1", "top5", "num_images"])


def model(directory: Path) -> dict[str, float]:
    """Size of the model and its MACs, in 1e9 for one image."""
    numbers = _read_json(directory / "model.json", "benchmark", ["parameters", "macs"])
    return {"parameters": numbers["parameters"], "gmacs": numbers["macs"] / 1e9}


def cost(directory: Path) -> pd.DataFrame:
    """Measured costs, one row per quantity and batch size; latency and training memory are always among them."""
    path = directory / "cost.csv"
    columns = {"quantity": str, "batch_size": "Int64"} | _MEASURED | {"launch_bound": bool}
    table = _of_first(read_csv(path, "benchmark", _WAY | columns), _WAY).drop(columns=list(_WAY))
    if missing := {"latency", "train_memory"} - set(table["quantity"]):
        raise UserError(f"{path}: no row for {', '.join(sorted(missing))}; `dvc repro -f benchmark` makes it anew")
    return table


def deployment(directory: Path) -> dict[str, Any]:
    """What runs where: sizes, accuracies and statuses; None is unknown."""
    return _figures(directory / "deployment.json", "deploy", _DEPLOYMENT)


def hardware(directory: Path) -> dict[str, Any]:
    """What a deployed model costs; None is unknown."""
    return _figures(directory / "hardware.json", "hardware", _HARDWARE)


def scaling(directory: Path) -> pd.DataFrame:
    """Costs of a block and of a model, one row per scope, batch, token count, mode and quantity, with exact MACs."""
    place = {"scope": str, "hidden_size": int, "batch": str, "batch_size": int, "tokens": int, "mode": str}
    columns = place | _MEASURED | {"status": str, "other_load": float, "contended": bool, "launch_bound": bool}
    table = _of_first(read_csv(directory / "scaling.csv", "scaling", _WAY | columns), _WAY).drop(columns=list(_WAY))
    table = pd.concat([_of_first(part, ["hidden_size"]) for _, part in table.groupby("scope", sort=False)])
    numbers = dict.fromkeys(("hidden_size", "tokens", "macs", "fused_macs"), int)
    macs = read_csv(directory / "macs.csv", "scaling", {"scope": str} | numbers)
    macs = macs.astype({"macs": "Int64", "fused_macs": "Int64"})
    return table.merge(macs, on=["scope", "hidden_size", "tokens"], how="left").drop(columns="hidden_size")


def _of_first(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Rows with the first values in these columns: what tables and figures show."""
    values = table[list(columns)]
    return table[values.eq(values.iloc[0]).all(axis=1)]


def fidelity(directory: Path) -> pd.DataFrame:
    """Errors to exact attention, one row per mechanism, size, source of q, k, v and layer, with the cost."""
    numbers = dict.fromkeys(["error", "error_low", "error_high"], float) | {"mixing_macs": int, "fused_macs": int}
    return read_csv(directory / "fidelity.csv", "fidelity", _FIDELITY | numbers)


def replaced(directory: Path) -> pd.DataFrame:
    """Accuracy of the trained `fused` model with another attention; no rows where there was no such model."""
    return read_csv(directory / "replaced.csv", "fidelity", _REPLACED, may_be_empty=True)


def cka(directory: Path) -> pd.DataFrame:
    """Similarity of layers, one row per ordered pair."""
    return read_csv(directory / "cka.csv", "representations", _CKA)


def heads(directory: Path) -> pd.DataFrame:
    """Attention distance and entropy, one row per head."""
    return read_csv(directory / "heads.csv", "representations", _HEADS | {"n_images": int, "implied": bool})


def gates(directory: Path) -> pd.DataFrame:
    """Mean share of each branch by layer, for mechanisms with a gate; no rows where there is none."""
    return read_csv(directory / "gates.csv", "representations", _GATES, may_be_empty=True)


def provenance(directory: Path, stage: str) -> dict[str, Any]:
    """Code, versions and machine of one result, by the stage that made it."""
    record = _load_json(directory / "provenance.json", stage)
    try:
        of_machine = {name: record["machine"][name] for name in _MACHINE}
        versions = {name: record["packages"][name] for name in ("effvit", "torch")}
        return {"stage": stage} | {name: record[name] for name in _ENVIRONMENT} | of_machine | versions
    except (KeyError, TypeError) as error:
        raise _no_provenance(directory, stage, _ENVIRONMENT + _MACHINE) from error


def measured_on(directory: Path, stage: str) -> dict[str, Any]:
    """What a measured result belongs to: ``machine``, the GPU or else the processor; ``threads``; ``dtype``.

    Threads are None on a GPU. The dtype is followed by how it was executed, where that was not eagerly.
    """
    record = _load_json(directory / "provenance.json", stage)
    try:
        gpu, processor, threads = (record["machine"][name] for name in ("gpu", "processor", "threads"))
        way = (record["config"]["dtype"], record["config"].get("execution", "eager"))
        dtype = ", ".join(each for each in way if each != "eager")
        return {"machine": gpu or processor, "threads": None if gpu else threads, "dtype": dtype}
    except (KeyError, TypeError) as error:
        raise _no_provenance(directory, stage, [*_MACHINE, "dtype"]) from error


def _no_provenance(directory: Path, stage: str, keys: Sequence[str]) -> UserError:
    return _malformed(directory / "provenance.json", stage, f"expected {', '.join(keys)}")


def _read_json(path: Path, stage: str, keys: Sequence[str]) -> dict[str, float]:
    content = _load_json(path, stage)
    try:
        return {key: content[key] + 0 for key in keys}  # + 0: numbers only
    except (KeyError, TypeError) as error:
        raise _malformed(path, stage, f"expected a JSON object with the numbers {', '.join(keys)}") from error


def _figures(path: Path, stage: str, keys: Sequence[str]) -> dict[str, Any]:
    content = _load_json(path, stage)
    if not isinstance(content, dict) or (missing := [key for key in keys if key not in content]):
        told = ", ".join(missing) if isinstance(content, dict) else "a JSON object"
        raise _malformed(path, stage, f"expected {told}")
    return {key: content[key] for key in keys}


def _load_json(path: Path, stage: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(path, stage) from error
    except ValueError as error:
        raise _malformed(path, stage, "not a whole JSON file") from error


def _load_arrays(path: Path, stage: str) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise _missing(path, stage) from error
    except SafetensorError as error:
        raise _malformed(path, stage, "not a whole safetensors file") from error


def read_csv(path: Path, stage: str, columns: dict[str, Any], *, may_be_empty: bool = False) -> pd.DataFrame:
    """The named columns of a CSV in these types; errors name `stage` as the one that writes it."""
    try:
        frame = _parse(path, columns)
    except FileNotFoundError as error:
        raise _missing(path, stage) from error
    except _UNREADABLE as error:
        raise _malformed(path, stage, _what_is_wrong(path, columns)) from error
    if frame.empty and not may_be_empty:
        raise _malformed(path, stage, "no rows")
    return frame[list(columns)]


def _parse(path: Path, columns: dict[Any, Any], rows: int | None = None) -> pd.DataFrame:
    with np.errstate(invalid="ignore"):  # an infinite count raises as well
        # a class may well be called "nan" or "null"; an empty field alone is a missing value
        return pd.read_csv(
            path,
            usecols=list(columns),
            index_col=False,
            dtype=columns,
            nrows=rows,
            keep_default_na=False,
            na_values=[""],
        )


def _what_is_wrong(path: Path, columns: dict[str, Any]) -> str:
    """The first cell that is not of its column's type, or else what the file should be."""
    try:
        text = _parse(path, dict.fromkeys(columns, str))
    except _UNREADABLE:
        return f"expected a CSV with the columns {', '.join(columns)}"

    def fails(column: str, rows: int) -> bool:
        try:
            _parse(path, {column: columns[column]}, rows)
        except _UNREADABLE:
            return True
        return False

    column = next(c for c in columns if fails(c, len(text)))
    row = bisect_left(range(len(text)), True, key=lambda row: fails(column, row + 1))
    value = text[column].iloc[row]
    found = "empty" if pd.isna(value) else repr(value)
    return f"line {row + 2}, {column}: {found}, expected {_KINDS[columns[column]]}"


def _missing(path: Path, stage: str) -> UserError:
    return UserError(f"{path}: missing; `dvc repro {stage}` makes it")


def _malformed(path: Path, stage: str, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; `dvc repro -f {stage}` makes it anew")
