"""``effvit aggregate``: the summary and the tables of a comparison."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli.options import Attentions, Datasets, MetricsDir


def aggregate(
    metrics_dir: MetricsDir,
    plots_data_dir: Annotated[Path, typer.Option(help="Directory to write the tables to; replaced as a whole.")],
    datasets: Datasets,
    attentions: Attentions,
    seeds: Annotated[list[int], typer.Option("--seed", help="Seed of the comparison; repeatable.")],
) -> None:
    """Gather the named cells, and no others, into METRICS_DIR/summary.json and tidy CSV tables."""
    from effvit.study.aggregate import aggregate as write_tables

    write_tables(metrics_dir, plots_data_dir, datasets, attentions, seeds)
    count = len(datasets) * len(attentions) * len(seeds)
    typer.echo(f"{count} cells: summary in {metrics_dir / 'summary.json'}, tables in {plots_data_dir}")
