"""``effvit cells``: names of a study's cells, for whatever runs them."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


class CellStage(str, Enum):
    """Stages that each cell has."""

    TRAIN = "train"
    EVALUATE = "evaluate"


def cells(
    stage: Annotated[
        CellStage, typer.Option(rich_help_panel=options.STUDY, help="Stage to name; `evaluate` is a cell's last.")
    ] = CellStage.EVALUATE,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing",
            rich_help_panel=options.STUDY,
            help="Only cells without files of a result; not those that changed since.",
        ),
    ] = False,
    params: Annotated[Path, typer.Option(rich_help_panel=options.FILES, help="The study's configuration.")] = Path(
        "params.yaml"
    ),
    metrics_dir: options.MetricsDir = Path("metrics"),
) -> None:
    """List the cells of a study, one DVC stage a line: `dvc repro NAME` runs one with what it needs.

    A cell is one training: a data set, a mechanism and a seed.
    """
    from effvit.study.config import Study

    study = Study.load(params)
    for dataset in study.dataset:
        for attention in study.attention:
            for seed in study.seeds:
                result = metrics_dir / "cells" / dataset / attention / f"seed{seed}" / stage.value
                if not (missing and result.is_dir() and any(result.iterdir())):
                    typer.echo(f"{stage.value}@{dataset}-{attention}-{seed}")
