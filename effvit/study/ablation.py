"""The hybrid's branches switched on one by one: results of an experiment sweep, gathered from DVC.

The sweep is `make ablation`; every experiment of it trains and measures one set of branches.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from effvit.analysis.survey import Rows, gate_rows, summed_gate_shares
from effvit.attention.hybrid import HybridAttention
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.evaluation.probe import normalised, recorded, validation_images
from effvit.model.checkpoint import load_model
from effvit.model.vit import ViT
from effvit.study import cells
from effvit.study.experiments import experiments

ATTENTION = "hybrid"
_IMAGES, _BATCH = 1000, 64  # validation images at most, as in `effvit representations`
_SHARES = ["dataset", "branches", "layer", "branch", "share", "of"]
_MIB = 2**20


@dataclass(frozen=True)
class Ablation:
    """One row per data set and set of branches; ``shares`` one row per layer and branch, where there are several.

    ``accuracy`` (fractions, exact) and ``cost`` (measured, as ratios to fused) are tables of their own. ``shares`` are
    of the heads, or where there is a gate its means.
    """

    accuracy: pd.DataFrame
    cost: pd.DataFrame
    shares: pd.DataFrame


def collect(repository: Path) -> Ablation:
    """Gather the experiments on the current commit that differ from the newest in their branches alone.

    Raises:
        UserError: no repository; no experiment of the hybrid alone; a result of one that is missing.
    """
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    newest = None
    for experiment, params in experiments(repository):
        if list(params["attention"]) != [ATTENTION]:
            continue
        branches = "+".join(params["attention"][ATTENTION].pop("branches"))
        recipe = json.dumps(params, sort_keys=True)
        newest = newest or recipe
        if recipe == newest:
            found.setdefault(branches, (experiment, params))
    if not found:
        raise UserError(
            f"{repository}: no experiment with attention={ATTENTION} on this commit; `make ablation` runs them"
        )
    parts = [
        part for branches, (fs, params) in sorted(found.items(), key=_order) for part in _read(branches, fs, params)
    ]
    accuracy, cost, shares = ([row for part in parts for row in part[i]] for i in range(3))
    return Ablation(pd.DataFrame(accuracy), pd.DataFrame(cost), pd.DataFrame(shares, columns=_SHARES))


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    """By the number of branches; regional, dilated and linear among as many."""
    branches = item[0].split("+")
    return len(branches), "".join(str("rdl".index(branch[0])) for branch in branches)


def _read(branches: str, experiment: Any, params: dict[str, Any]) -> Iterator[tuple[Rows, Rows, Rows]]:
    for dataset in params["dataset"]:
        key: dict[str, object] = {"dataset": dataset, "branches": branches}
        with tempfile.TemporaryDirectory() as directory:
            cell, models, data = (Path(directory, name) for name in ("cell", "models", "data"))
            for source, target in (
                (f"metrics/cells/{dataset}/{ATTENTION}", cell),
                (f"models/{dataset}/{ATTENTION}/seed{params['seeds'][0]}", models),
                (f"data/prepared/{dataset}", data),
            ):
                experiment.get(source, str(target), recursive=True)
            size, cost = cells.model(cell / "benchmark"), cells.cost(cell / "benchmark")
            accuracy = accuracy_over([cell / f"seed{seed}" / "evaluate" for seed in params["seeds"]])
            latency = cost[cost["quantity"] == "latency"].sort_values("batch_size").iloc[-1]
            memory = cost[cost["quantity"] == "train_memory"].iloc[0]
            measured = {"batch_size": latency["batch_size"], "latency_ratio": latency["ratio_to_fused"]}
            measured |= {f"latency_ratio_{end}": latency[f"ratio_{end}"] for end in ("low", "high")}
            measured |= {"train_memory_mib": memory["median"] / _MIB, "train_memory_ratio": memory["ratio_to_fused"]}
            prepared = PreparedDataset.load(data)
            hybrid = load_model(models)
            images, _ = validation_images(prepared, _IMAGES)
            shares = branch_shares(hybrid, normalised(hybrid, images, prepared))
        yield [key | accuracy | size], [key | measured], [key | row for row in shares]


def accuracy_over(evaluations: list[Path]) -> dict[str, object]:
    """Mean top-1 over seeds, a directory of `effvit evaluate` each, with a 95 % interval.

    ``interval`` says which: Student's t over seeds, or, for one seed, Wilson's of a binomial share over test images.
    """
    top1 = np.array([cells.evaluation(directory)["top1"] for directory in evaluations])
    n_images = int(cells.confusion(evaluations[0])["count"].sum())
    if len(top1) == 1:
        right = round(float(top1[0]) * n_images)
        interval: Any = stats.binomtest(right, n_images).proportion_ci(method="wilson")
    else:
        interval = stats.ttest_1samp(top1, 0).confidence_interval(0.95)
    kind = "images" if len(top1) == 1 else "seeds"
    shown = {"top1": float(top1.mean()), "top1_low": float(interval.low), "top1_high": float(interval.high)}
    return {"n_seeds": len(top1), "n_images": n_images, "interval": kind} | shown


@torch.inference_mode()
def branch_shares(model: ViT, images: torch.Tensor) -> Rows:
    """Share of each branch by layer (from 1): of the heads, or of a gate, as a mean over images and their patches.

    ``of`` says which. No rows for a hybrid of one branch.

    Args:
        model: with the hybrid in its blocks.
        images: normalised, ``(n, C, H, W)``.
    """
    total = None
    for batch in images.split(_BATCH):
        with recorded(inputs_of=model.attentions()) as inputs:
            model(batch)
        shares = summed_gate_shares(model, inputs)
        if shares is None:
            return _head_shares(model)
        total = shares if total is None else total + shares
    return [] if total is None else [row | {"of": "gate"} for row in gate_rows(model, total / len(images))]


def _head_shares(model: ViT) -> Rows:
    hybrids = [(layer, a) for layer, a in enumerate(model.attentions(), 1) if isinstance(a, HybridAttention)]
    if len({name for _, attention in hybrids for name in attention.branch_names}) < 2:
        return []
    return [
        {"layer": layer, "branch": branch, "share": heads / attention.num_heads, "of": "heads"}
        for layer, attention in hybrids
        for branch, heads in zip(attention.branch_names, attention.heads_of_branches, strict=True)
    ]
