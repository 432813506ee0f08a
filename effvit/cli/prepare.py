"""``effvit prepare``: any data set to the one prepared format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effvit.cli.options import OutputDir

if TYPE_CHECKING:
    from effvit.data.loading.prepared import PreparedDataset


def prepare(
    dataset: Annotated[str, typer.Option(help="Name of the data set; a wrong one is answered with the known ones.")],
    output_dir: OutputDir,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Where the original files are or go.", show_default="$EFFVIT_DATA/DATASET, or the user's cache"
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Height and width of the prepared images in pixels.")] = 32,
    classes: Annotated[
        Path | None, typer.Option(help="File with the classes to take, one a line, of imagenet100 or folder.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="How many classes there must be.", show_default="any")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that read image files.", show_default="as many as there are cores"),
    ] = None,
) -> None:
    """Write a data set with splits and normalisation, downloading it where needed.

    Started again after an interruption, it goes on from what was finished.
    """
    import time

    from effvit.data import preparing

    start = time.perf_counter()
    prepared = preparing.prepare(
        dataset,
        root,
        image_size,
        output_dir,
        classes=classes,
        num_classes=num_classes,
        workers=workers or _cores(),
    )
    typer.echo(_describe(prepared))
    typer.echo(f"written to {output_dir} in {time.perf_counter() - start:.1f} s")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(prepared: "PreparedDataset") -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    lines = [
        f"{prepared.name}: {len(prepared.classes)} classes, {prepared.image_size}x{prepared.image_size} RGB",
        f"source: {prepared.source}",
        f"images: {counts}, stored as {prepared.storage}",
        f"mean {prepared.mean}, standard deviation {prepared.std} of the training part",
    ]
    for split, notes in prepared.notes.items():
        lines += [f"{split}: {count:,} {what}" for what, count in notes.items()]
    return "\n".join(lines)
