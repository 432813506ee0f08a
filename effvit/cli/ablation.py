"""``effvit ablation``: what each of the hybrid's branches contributes, from a sweep of experiments."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def ablation(
    output_dir: options.OutputDir,
    repository: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="DVC repository whose experiments to gather.")
    ] = Path(),
) -> None:
    """Gather the experiments of `make ablation`: accuracy and cost per set of branches, shares of branches per layer.

    Writes accuracy.csv and shares.csv (always the same), cost.csv (measured) and one figure per data set.
    """
    import pandas as pd

    from effvit.figures import ablation as draw
    from effvit.figures import save
    from effvit.files import staged_dir, write_csv
    from effvit.study.ablation import collect

    tables = collect(repository)
    with staged_dir(output_dir, ("accuracy.csv", "*.csv", "*.png")) as aside:
        for name, table in vars(tables).items():
            write_csv(aside / f"{name}.csv", table)
        for dataset in pd.unique(tables.accuracy["dataset"]):
            mine = [table[table["dataset"] == dataset] for table in vars(tables).values()]
            save(draw(*mine), aside / f"{dataset}.png")
    typer.echo(f"{len(tables.accuracy)} sets of branches in {output_dir}")
