"""Models trained under one recipe that differ in their attention: what differs, and accuracy over seeds.

A run is the log of one `effvit train`. `make hybrid-search` is a sweep of them.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from effvit.attention import check_options
from effvit.errors import UserError
from effvit.model.vit import ViT, ViTConfig
from effvit.study import cells
from effvit.study.experiments import experiments
from effvit.training.recipe import TrainConfig

_VARIES = {"attention", "attention_options", "value_conv"}  # of a model's configuration
_OF_THE_MACHINE = {"checkpoint_s", "device", "devices", "micro_batch_size", "workers"}  # of a recipe
Variant = tuple[str, str, int]
"""Mechanism, its options that are not the defaults, and ``value_conv``."""


@dataclass(frozen=True)
class Run:
    """One training: when it ended, its model and seed, the highest validation accuracy, what all variants share."""

    time: str
    config: ViTConfig
    seed: int
    accuracy: float
    shared: str

    @property
    def variant(self) -> Variant:
        """What tells its model from the others."""
        name = self.config.attention
        defaults, options = (check_options(name, o).model_dump() for o in ({}, self.config.attention_options))
        changed = [f"{key}={value}".replace(" ", "") for key, value in options.items() if value != defaults[key]]
        return name, " ".join(changed), self.config.value_conv


def runs_below(directory: Path) -> list[Run]:
    """Read all logs of trainings below a directory.

    Raises:
        UserError: there is none, or one is malformed.
    """
    runs = [_run(path.parent) for path in sorted(directory.rglob("history.csv"))]
    if not runs:
        raise UserError(f"{directory}: no history.csv below it; expected logs of `effvit train`")
    return runs


def runs_of_experiments(repository: Path) -> list[Run]:
    """Read the logs of all trainings of DVC's experiments on the current commit.

    Raises:
        UserError: no repository, no experiment, or a log that is malformed.
    """
    with tempfile.TemporaryDirectory() as directory:
        for number, (files, params) in enumerate(experiments(repository)):
            for cell in (
                f"{d}/{a}/seed{s}" for d in params["dataset"] for a in params["attention"] for s in params["seeds"]
            ):
                files.get(f"metrics/cells/{cell}/train", f"{directory}/{number}/{cell}", recursive=True)
        if not any(Path(directory).iterdir()):
            raise UserError(f"{repository}: no experiment on this commit; `make hybrid-search` runs them")
        return runs_below(Path(directory))


def _run(log: Path) -> Run:
    history, file = cells.history(log), log / "provenance.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        settings = record["config"]
        config = ViTConfig(**settings["model"])
        common = {key: value for key, value in config.model_dump().items() if key not in _VARIES}
        recipe = TrainConfig(**settings["train"]).model_dump(exclude=_OF_THE_MACHINE)  # an older log has fewer fields
        shared = json.dumps({"dataset": settings["dataset"], **recipe, "model": common}, sort_keys=True)
        return Run(record["time"], config, settings["seed"], float(history["val_accuracy"].max()), shared)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{file}: expected model, train, dataset, seed and time, as `effvit train` writes") from error


def newest_search(runs: Sequence[Run]) -> dict[Variant, list[Run]]:
    """Group by variant the runs that share all else with the newest, the newest of each seed; most accurate first."""
    newest = max(runs, key=lambda run: run.time)
    found: dict[Variant, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: run.time):
        if run.shared == newest.shared:
            found.setdefault(run.variant, {})[run.seed] = run
    grouped = {variant: [of_seeds[seed] for seed in sorted(of_seeds)] for variant, of_seeds in found.items()}
    return dict(sorted(grouped.items(), key=lambda item: -_mean([run.accuracy for run in item[1]])))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def variants_table(search: dict[Variant, list[Run]]) -> pd.DataFrame:
    """A row for each variant: accuracy over seeds, parameters and multiply-adds of its model."""
    rows = []
    for (attention, options, value_conv), runs in search.items():
        model, accuracies, shared = ViT(runs[0].config), [run.accuracy for run in runs], json.loads(runs[0].shared)
        rows.append(
            {
                "attention": attention,
                "options": options,
                "value_conv": value_conv,
                "seeds": " ".join(str(run.seed) for run in runs),
                "val_top1": _mean(accuracies),
                "val_top1_lowest": min(accuracies),
                "val_top1_highest": max(accuracies),
                "parameters": sum(p.numel() for p in model.parameters()),
                "macs": model.macs(),
                "dataset": shared["dataset"],
                "epochs": shared["epochs"],
                "lr": shared["lr"],
            }
        )
    return pd.DataFrame(rows)
