"""``effvit prepare``: any data set to the one prepared format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effvit.cli.options import OutputDir

if TYPE_CHECKING:
    from effvit.data import PreparedDataset


def prepare(
    dataset: Annotated[str, typer.Option(help="Name of the data set; a wrong one is answered with the known ones.")],
    output_dir: OutputDir,
    root: Annotated[
        Path | None,
        typer.Option(help="Where the original files are or go [default: $EFFVIT_DATA/DATASET, or the user's cache]."),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Height and width of the prepared images in pixels.")] = 32,
) -> None:
    """Write a data set as memory-mapped arrays with splits and normalisation, downloading it where needed."""
    import time

    from effvit import data

    start = time.perf_counter()
    prepared = data.prepare(dataset, root, image_size, output_dir)
    typer.echo(_describe(prepared))
    typer.echo(f"written to {output_dir} in {time.perf_counter() - start:.1f} s")


def _describe(prepared: "PreparedDataset") -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    lines = [
        f"{prepared.name}: {len(prepared.classes)} classes, {prepared.image_size}x{prepared.image_size} RGB",
        f"source: {prepared.source}",
        f"images: {counts}",
        f"mean {prepared.mean}, standard deviation {prepared.std} of the training part",
    ]
    for split, notes in prepared.notes.items():
        lines += [f"{split}: {count:,} {what}" for what, count in notes.items()]
    return "\n".join(lines)
