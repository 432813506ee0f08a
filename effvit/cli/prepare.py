"""``effvit prepare``: any data set to the one prepared format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effvit.cli import options

if TYPE_CHECKING:
    from effvit.data.loading.prepared import PreparedDataset


def prepare(
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=options.complete_dataset,
            rich_help_panel=options.FILES,
            help="digits, cifar10, cifar100, imagenet100 or folder.",
        ),
    ],
    output_dir: options.OutputDir,
    root: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES,
            help="Folder, .zip, .tar, .parquet or .npz with the originals; downloads go there.",
            show_default="$EFFVIT_DATA/DATASET, or the user's cache",
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Height and width of the prepared images in pixels.")] = 32,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File with one class to take per line; for imagenet100 and folder.", show_default="all classes"
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of each class to hold out as test split.", show_default="the originals' own test split"
        ),
    ] = None,
    label_level: Annotated[int, typer.Option(help="Level of the folders that are the classes, 1 for the top.")] = 1,
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of images in a CSV or Parquet file.", show_default="by its name"),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of classes, e.g. coarse_label.", show_default="by its name"),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Fail unless there are this many classes.", show_default="any number")
    ] = None,
    skip_damaged: Annotated[
        bool,
        typer.Option(
            "--skip-damaged",
            rich_help_panel=options.FILES,
            help="Leave damaged images out and list them in damaged.csv.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that read image files.", show_default="one per core"),
    ] = None,
) -> None:
    """Download a data set if needed and write it with its splits and normalisation.

    After an interruption, the same command resumes with what is missing.
    """
    import time

    from effvit.data import preparing
    from effvit.processor import cores

    start = time.perf_counter()
    prepared = preparing.prepare(
        dataset,
        root,
        image_size,
        output_dir,
        classes=classes,
        num_classes=num_classes,
        workers=workers or cores(),
        skip_damaged=skip_damaged,
        test_share=test_share,
        label_level=label_level,
        image_column=image_column,
        label_column=label_column,
    )
    typer.echo(_describe(prepared))
    typer.echo(f"written to {output_dir} in {time.perf_counter() - start:.1f} s")


def _describe(prepared: "PreparedDataset") -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    lines = [
        f"{prepared.name}: {len(prepared.classes)} classes, {prepared.image_size}x{prepared.image_size} RGB",
        f"source: {prepared.source}",
        f"images: {counts}, stored as {prepared.storage}",
        f"mean {prepared.mean}, standard deviation {prepared.std} of the training split",
    ]
    for split, notes in prepared.notes.items():
        lines += [f"{split}: {count:,} {what}" for what, count in notes.items()]
    return "\n".join(lines)
