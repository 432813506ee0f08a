"""The study's tables and its summary, gathered from the cells that are asked for and from no others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from effvit.analysis.efficiency import efficiency
from effvit.errors import UserError
from effvit.files import staged_dir, write_csv, write_json
from effvit.study import cells
from effvit.study.paired import compare_to_fused

_MIB = 2**20
_MAY_LACK = (cells.replaced, cells.gates)
_ANALYSES = ("fidelity", "representations")
_CONFUSED = ["dataset", "attention", "actual", "predicted"]


@dataclass(frozen=True)
class Tables:
    """Tidy tables, one row per result. Accuracies are fractions 0..1; units stand in a column or its name."""

    curves: pd.DataFrame
    accuracy: pd.DataFrame
    paired: pd.DataFrame
    cost: pd.DataFrame
    tradeoff: pd.DataFrame
    scaling: pd.DataFrame
    efficiency: pd.DataFrame
    confusion: pd.DataFrame
    hardware: pd.DataFrame
    fidelity: pd.DataFrame
    replaced: pd.DataFrame
    cka: pd.DataFrame
    heads: pd.DataFrame
    gates: pd.DataFrame
    provenance: pd.DataFrame


def aggregate(
    metrics_dir: Path, plots_data_dir: Path, datasets: Sequence[str], attentions: Sequence[str], seeds: Sequence[int]
) -> None:
    """Write `metrics_dir/summary.json` and one CSV per table into `plots_data_dir`, which is replaced as a whole.

    Raises:
        UserError: an empty selection or one with duplicates; a file of a selected cell that is missing or malformed;
            times of one table that are of two machines.
    """
    tables = collect(metrics_dir, datasets, attentions, seeds)
    with staged_dir(plots_data_dir, ("tradeoff.csv", "*.csv")) as aside:
        for field in fields(tables):
            write_csv(aside / f"{field.name}.csv", getattr(tables, field.name))
        write_json(metrics_dir / "summary.json", summarise(tables))


def collect(metrics_dir: Path, datasets: Sequence[str], attentions: Sequence[str], seeds: Sequence[int]) -> Tables:
    """Read the selected cells below `metrics_dir`; same errors as `aggregate`."""
    for name, values in (("dataset", datasets), ("attention", attentions), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            given = ", ".join(map(str, values)) or "none"
            raise UserError(f"{name}: expected one or more, each once, got {given}")
    root = metrics_dir / "cells"
    pairs = [({"dataset": d, "attention": a}, root / d / a) for d, a in product(datasets, attentions)]
    runs = [(key | {"seed": seed}, cell / f"seed{seed}") for (key, cell), seed in product(pairs, seeds)]
    evaluations = pd.DataFrame(
        [
            key
            | cells.evaluation(run / "evaluate")
            | {"val_before": cells.accuracy_before(run / "train")}
            | {"val_after": cells.history(run / "train")["val_accuracy"].max()}
            for key, run in runs
        ]
    )
    predictions = {
        (d, a, seed): cells.predictions(root / d / a / f"seed{seed}" / "evaluate")
        for d, a, seed in product(datasets, attentions, seeds)
    }
    models = pd.DataFrame([key | cells.model(cell / "benchmark") for key, cell in pairs])
    accuracy = _accuracy(evaluations, models)
    benchmarks = [(key, cell / "benchmark") for key, cell in pairs]
    hardware = _machine([(key, cell / "hardware") for key, cell in pairs], "hardware")
    scalings = [({"attention": a}, metrics_dir / "scaling" / a) for a in attentions]
    cost = _measured(benchmarks, "benchmark", cells.cost)
    scaling = _measured(scalings, "scaling", cells.scaling)
    analyses = [(d, metrics_dir / "analysis" / d) for d in datasets]
    pairs_seen = _stack([(key, cells.confusion(run / "evaluate")) for key, run in runs])
    return Tables(
        curves=_stack([(key, cells.history(run / "train")) for key, run in runs]),
        accuracy=accuracy,
        paired=compare_to_fused(predictions, datasets, attentions, seeds),
        cost=cost,
        tradeoff=_tradeoff(accuracy, cost),
        scaling=scaling,
        confusion=pairs_seen.groupby(_CONFUSED, sort=False)["count"].sum().reset_index(),
        hardware=pd.DataFrame(
            [
                key | hardware | cells.deployment(cell / "deploy") | cells.hardware(cell / "hardware")
                for key, cell in pairs
            ]
        ),
        fidelity=_selected(analyses, "fidelity", cells.fidelity, attentions),
        replaced=_selected(analyses, "fidelity", cells.replaced, attentions),
        cka=_selected(analyses, "representations", cells.cka, attentions),
        heads=_selected(analyses, "representations", cells.heads, attentions),
        gates=_selected(analyses, "representations", cells.gates, attentions),
        provenance=pd.DataFrame(
            [key | cells.provenance(run / stage, stage) for key, run in runs for stage in ("train", "evaluate")]
            + [
                key | cells.provenance(cell / stage, stage)
                for key, cell in pairs
                for stage in ("benchmark", "deploy", "hardware")
            ]
            + [{"dataset": d} | cells.provenance(place / s, s) for d, place in analyses for s in _ANALYSES]
            + [key | cells.provenance(directory, "scaling") for key, directory in scalings]
        ).astype({"seed": "Int64"}),
        efficiency=efficiency(
            scaling[~scaling["launch_bound"]]
        ),  # takes longest, so after all files are known to be whole
    )


def summarise(tables: Tables) -> dict[str, Any]:
    """What DVC shows of a study, five significant digits; what is not known is left out.

    Accuracy is ``{dataset: {attention: top1}}``: names that short let six mechanisms stand side by side in
    ``dvc exp show``. The rest is below ``cost`` (``gmacs``, ``latency_ratio`` to fused, ``memory_mib`` of a training
    step) and, for several seeds, ``spread`` (``ci95``, half the 95 % interval of top1; ``n`` seeds).
    """
    accuracy: dict[str, dict[str, float]] = {}
    cost: dict[str, dict[str, dict[str, float]]] = {}
    spread: dict[str, dict[str, dict[str, float]]] = {}
    interval = (tables.accuracy["top1"] - tables.accuracy["top1_low"]).to_numpy()
    for row, ci95, n in zip(tables.tradeoff.itertuples(), interval, tables.accuracy["n_seeds"], strict=True):
        dataset, attention = str(row.dataset), str(row.attention)
        costs: dict[str, Any] = {
            "gmacs": row.gmacs,
            "latency_ratio": row.latency_ratio,
            "memory_mib": row.train_memory_mib,
        }
        accuracy.setdefault(dataset, {})[attention] = _rounded(row.top1)
        known = {key: _rounded(value) for key, value in costs.items() if np.isfinite(value)}
        cost.setdefault(dataset, {})[attention] = known
        if n > 1:
            spread.setdefault(dataset, {})[attention] = {"ci95": _rounded(ci95), "n": int(n)}
    return accuracy | {"cost": cost} | ({"spread": spread} if spread else {})


def _rounded(value: Any) -> float:
    return float(f"{value:.5g}")


def _accuracy(runs: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds with the 95 % interval of Student's t, with what is known of the model without measuring."""
    groups = runs.groupby(["dataset", "attention"], sort=False)
    means = {name: (name, "mean") for name in ("top1", "top5", "val_before", "val_after")}
    table = groups.agg(n_seeds=("seed", "size"), **means).reset_index()
    # NaN for one seed, where neither the deviation nor a t of zero degrees of freedom exists
    half = groups["top1"].sem().to_numpy() * stats.t.ppf(0.975, table["n_seeds"] - 1)
    table.insert(4, "top1_low", table["top1"] - half)
    table.insert(5, "top1_high", table["top1"] + half)
    table.insert(3, "n_images", groups["num_images"].first().to_numpy())
    table = table.merge(models, on=["dataset", "attention"], validate="one_to_one")
    fused = table["dataset"].map(table[table["attention"] == "fused"].set_index("dataset")["parameters"])
    differ = ((table["parameters"] - fused).abs() * 10 > fused).astype("boolean")
    return table.assign(parameters_differ=differ.mask(fused.isna()))  # unknown where fused is not selected


def _tradeoff(accuracy: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    def at_largest_batch(quantity: str) -> pd.DataFrame:
        rows = cost[cost["quantity"] == quantity].sort_values("batch_size", na_position="first")
        return rows.drop_duplicates(["dataset", "attention"], keep="last").set_index(["dataset", "attention"])

    wilson = [_wilson(*row) for row in accuracy[["top1", "n_images", "n_seeds"]].itertuples(index=False)]
    keys = pd.MultiIndex.from_frame(accuracy[["dataset", "attention"]])
    fused = accuracy["attention"] == "fused"
    latency, memory = (at_largest_batch(q).reindex(keys) for q in ("latency", "train_memory"))
    # the ratio of a model to itself is 1; what was measured there is how far ratios can be trusted, see `cost`
    ratio = latency[["ratio_to_fused", "ratio_low", "ratio_high"]].mask(latency["launch_bound"].eq(True))
    ratio = ratio.set_axis(accuracy.index)
    ratio = ratio.mask(fused & ratio["ratio_to_fused"].notna(), 1.0)
    return accuracy[["dataset", "attention", "top1", "top1_low", "top1_high", "gmacs"]].assign(
        top1_images_low=[low for low, _ in wilson],
        top1_images_high=[high for _, high in wilson],
        batch_size=latency["batch_size"].to_numpy(),
        latency_ratio=ratio["ratio_to_fused"],
        latency_ratio_low=ratio["ratio_low"],
        latency_ratio_high=ratio["ratio_high"],
        train_memory_mib=memory["median"].to_numpy() / _MIB,
    )


def _wilson(top1: float, n_images: int, n_seeds: int) -> tuple[float, float]:
    """95 % interval of one trained model's accuracy on images like those of the test split (Wilson 1927).

    NaN for several seeds, whose spread says more.
    """
    if n_seeds > 1:
        return float("nan"), float("nan")
    interval = stats.binomtest(round(top1 * n_images), int(n_images)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _selected(
    analyses: Sequence[tuple[str, Path]],
    stage: str,
    read: Callable[[Path], pd.DataFrame],
    attentions: Sequence[str],
) -> pd.DataFrame:
    """What a stage found for each data set, of the named mechanisms alone; of each it must have found something.

    Only a table that may have no rows at all may lack a mechanism.
    """
    tables = []
    for dataset, place in analyses:
        table = read(place / stage)
        names = [column for column in table.columns if str(column).startswith("attention")]
        table = table[table[names].isin(attentions).all(axis=1)]
        if read not in _MAY_LACK and (absent := [a for a in attentions if a not in set(table[names[0]])]):
            raise UserError(f"{place / stage}: nothing with {', '.join(absent)}; `dvc repro -f {stage}` makes it anew")
        tables.append(({"dataset": dataset}, table))
    return _stack(tables)


def _measured(
    places: Sequence[tuple[dict[str, Any], Path]], stage: str, read: Callable[[Path], pd.DataFrame]
) -> pd.DataFrame:
    """What a stage measured, the machine a part of each row's key."""
    machine = _machine(places, stage)
    return _stack([(key | machine, read(directory)) for key, directory in places]).astype({"threads": "Int64"})


def _machine(places: Sequence[tuple[dict[str, Any], Path]], stage: str) -> dict[str, Any]:
    """Where all of a stage's results were measured, which must be one machine: times of several do not compare."""
    first, *others = ((directory, cells.measured_on(directory, stage)) for _, directory in places)
    for directory, machine in others:
        if machine != first[1]:
            here, there = (
                ", ".join(f"{value} threads" if key == "threads" else str(value) for key, value in m.items() if value)
                for m in (machine, first[1])
            )
            raise UserError(
                f"{directory}: measured on another machine ({here}) than {first[0]} ({there}); `dvc repro -f {stage}` "
                "measures all on this one"
            )
    return first[1]


def _stack(parts: Sequence[tuple[dict[str, Any], pd.DataFrame]]) -> pd.DataFrame:
    """One frame of all parts, each with its key's columns in front."""
    return pd.concat([part.assign(**key)[[*key, *part.columns]] for key, part in parts], ignore_index=True)
