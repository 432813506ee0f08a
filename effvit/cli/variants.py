"""``effvit variants``: trained models that differ in their attention, from a sweep of experiments or from logs."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def variants(
    output_dir: options.OutputDir,
    repository: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="DVC repository whose experiments to gather.")
    ] = Path(),
    runs: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES, help="Instead of --repository: directory of logs of `effvit train`."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(rich_help_panel=options.MEASUREMENT, help="Also time the models, which takes minutes.")
    ] = True,
    batch_size: Annotated[int, typer.Option(rich_help_panel=options.MEASUREMENT, help="Images per batch.")] = 64,
    budget_s: Annotated[
        float, typer.Option(rich_help_panel=options.MEASUREMENT, help="Seconds of sampling per model and quantity.")
    ] = 5.0,
    threads: options.Threads = None,
) -> None:
    """Compare trainings of `make hybrid-search`: validation accuracy over seeds, multiply-adds, time vs fused.

    Takes the newest training and those that share its recipe, data and model but for the attention. Writes variants.csv
    (always the same); with --measure cost.csv and provenance.json (measured, on the CPU).
    """
    import pandas as pd
    import torch

    from effvit.device import pick_device, this_machine
    from effvit.files import staged_dir, write_csv
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import require_positive
    from effvit.measure.variants import measure_variants
    from effvit.provenance import write_provenance
    from effvit.study.variants import newest_search, runs_below, runs_of_experiments, variants_table

    require_positive(batch_size=batch_size, budget_s=budget_s, threads=threads)
    search = newest_search(runs_below(runs) if runs else runs_of_experiments(repository))
    table = variants_table(search)
    with staged_dir(output_dir, ("variants.csv", "cost.csv", "provenance.json")) as staged:
        write_csv(staged / "variants.csv", table)
        if measure:
            if threads:
                torch.set_num_threads(threads)
            torch.manual_seed(0)
            with measuring_alone():
                configs = [of_variant[0].config for of_variant in search.values()]
                rows = measure_variants(configs, batch_size=batch_size, budget_s=budget_s)
            key = table[["attention", "options", "value_conv"]]
            write_csv(staged / "cost.csv", key.join(pd.DataFrame(rows)).assign(batch_size=batch_size))
            settings = {"batch_size": batch_size, "budget_s": budget_s, "dtype": "float32"}
            write_provenance(staged, settings, this_machine(pick_device("cpu")))
    typer.echo(f"{len(table)} variants in {output_dir}")
