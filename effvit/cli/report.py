"""``effvit report``: the answers, tables, charts and figures of a comparison as one page."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def report(
    data_dir: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="Directory of the tables written by `effvit aggregate`.")
    ],
    figures_dir: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="Directory of the figures written by `effvit plot`.")
    ],
    output_dir: options.OutputDir,
    vector_dir: Annotated[
        Path | None, typer.Option(rich_help_panel=options.FILES, help="Directory of the same figures as SVG.")
    ] = None,
) -> None:
    """Answer the research questions from the tables, as index.html and report.md.

    index.html is self-contained and needs no network.
    """
    from effvit.files import check_apart, staged_dir
    from effvit.report import page, tables

    check_apart(output_dir, data_dir, figures_dir, *([vector_dir] if vector_dir else []))
    study = tables.read(data_dir)
    figures = page.pictures(figures_dir, vector_dir, study.datasets)
    with staged_dir(output_dir, ("index.html", "report.md")) as aside:
        (aside / "index.html").write_text(page.html(study, figures), encoding="utf-8", newline="\n")
        (aside / "report.md").write_text(page.markdown(study, figures, output_dir), encoding="utf-8", newline="\n")
    typer.echo(
        f"{output_dir / 'index.html'} and report.md: {len(study.attentions)} mechanisms on {', '.join(study.datasets)}"
    )
