"""``effvit evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options

_FILES = ("evaluation.json", "*.csv", "attention_maps.*", "worst.png", "provenance.json")


def evaluate(
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    worst: Annotated[
        int,
        typer.Option(
            min=0,
            max=200,
            rich_help_panel=options.FILES,
            help="Draw the most confident mistakes, so many, in worst.png.",
            show_default="none",
        ),
    ] = 0,
    corruptions: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES,
            help="Folder of CIFAR-10-C's .npy files; adds corruptions.csv.",
            show_default="none",
        ),
    ] = None,
    batch_size: options.ImagesPerPass = 256,
    device: options.Device = "auto",
) -> None:
    """Score a trained model on the test split: accuracy, calibration, confusion, attention maps."""
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device, this_machine
    from effvit.evaluation.predict import check_fits, map_test_images, score_test_split
    from effvit.files import check_apart, staged_dir, write_csv
    from effvit.model.checkpoint import load_model
    from effvit.provenance import write_provenance

    check_apart(output_dir, model_dir, dataset_dir, *filter(None, [corruptions]))
    where = pick_device(device)
    model = load_model(model_dir, where)
    dataset = PreparedDataset.load(dataset_dir)
    dataset = check_fits(model, dataset)
    with staged_dir(output_dir, _FILES) as directory:
        scores = score_test_split(model, dataset, directory, batch_size, worst)
        map_test_images(model, dataset, directory)
        if corruptions:
            from effvit.evaluation.corruptions import score_corruptions

            corrupted = score_corruptions(model, dataset, corruptions, batch_size)
            write_csv(directory / "corruptions.csv", corrupted)
        settings = {"model": model.config.model_dump(), "dataset": dataset.name}
        write_provenance(directory, settings, this_machine(where))
    top5 = f"top-5 {scores['top5']:.2%}, " if len(dataset.classes) > 5 else ""  # of five classes it is always 100 %
    typer.echo(
        f"{model.config.attention} on {scores['num_images']:,} test images of {dataset.name}: "
        f"top-1 {scores['top1']:.2%}, {top5}calibration error {scores['ece']:.3f}"
    )
    if corruptions:
        count = corrupted["corruption"].nunique()
        typer.echo(f"mean top-1 under {count} corruptions: {corrupted['top1'].mean():.2%}, see corruptions.csv")
