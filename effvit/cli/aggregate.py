"""``effvit aggregate``: the summary and the tables of a comparison."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def aggregate(
    metrics_dir: options.MetricsDir,
    plots_data_dir: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="Directory to write the tables to; it is replaced.")
    ],
    datasets: options.Datasets,
    attentions: options.Attentions,
    seeds: options.Seeds,
) -> None:
    """Gather the results of the named cells into METRICS_DIR/summary.json and tidy CSV tables.

    A cell is one training: a data set, a mechanism and a seed.
    """
    from effvit.study.aggregate import aggregate as write_tables

    write_tables(metrics_dir, plots_data_dir, datasets, attentions, seeds)
    count = len(datasets) * len(attentions) * len(seeds)
    typer.echo(f"{count} cells: summary in {metrics_dir / 'summary.json'}, tables in {plots_data_dir}")
