"""``effvit evaluate``."""

import typer

from effvit.cli import options


def evaluate(
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    batch_size: options.ImagesPerPass = 256,
    device: options.Device = "auto",
) -> None:
    """Score a trained model on the test split: accuracy, calibration, confusion, attention maps."""
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device, this_machine
    from effvit.evaluation.predict import check_fits, map_test_images, score_test_split
    from effvit.files import check_apart, staged_dir
    from effvit.model.checkpoint import load_model
    from effvit.provenance import write_provenance

    check_apart(output_dir, model_dir, dataset_dir)
    where = pick_device(device)
    model = load_model(model_dir, where)
    dataset = PreparedDataset.load(dataset_dir)
    dataset = check_fits(model, dataset)
    with staged_dir(output_dir, ("evaluation.json", "*.csv", "attention_maps.*", "provenance.json")) as directory:
        scores = score_test_split(model, dataset, directory, batch_size)
        map_test_images(model, dataset, directory)
        settings = {"model": model.config.model_dump(), "dataset": dataset.name}
        write_provenance(directory, settings, this_machine(where))
    typer.echo(
        f"{model.config.attention} on {scores['num_images']:,} test images of {dataset.name}: "
        f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}, calibration error {scores['ece']:.3f}"
    )
