"""``effvit samples``: what the images of a prepared data set look like."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def samples(
    dataset_dir: options.DatasetDir,
    output: Annotated[Path, typer.Option(rich_help_panel=options.FILES, help="PNG file to write.")],
    per_class: Annotated[int, typer.Option(help="Images per class, if there are at most 20 classes.")] = 8,
) -> None:
    """Draw a labelled sheet of training images."""
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.data.samples import sample_sheet
    from effvit.errors import UserError
    from effvit.files import staged_file

    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: expected a file name that ends in .png")
    figure = sample_sheet(PreparedDataset.load(dataset_dir), per_class)
    with staged_file(output) as aside:
        figure.savefig(aside, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    typer.echo(f"written to {output}")
