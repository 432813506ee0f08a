"""``effvit representations``: how similar models with different attention are, and where they look."""

import typer

from effvit.cli import options

_LOOKED_AT = 1000  # validation images at most


def representations(
    model_dirs: options.ModelDirs,
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    batch_size: options.ImagesPerPass = 64,
    device: options.Device = "auto",
) -> None:
    """Compare layers and heads of trained models on the same validation images.

    Writes cka.csv (similarity of all pairs of layers), heads.csv (attention distance and entropy of each head) and
    gates.csv (shares of a hybrid's branches).
    """
    from effvit.analysis.survey import survey
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device, this_machine
    from effvit.evaluation.probe import load_models, validation_images
    from effvit.files import check_apart, staged_dir, write_csv
    from effvit.provenance import write_provenance

    check_apart(output_dir, dataset_dir, *model_dirs)
    dataset = PreparedDataset.load(dataset_dir)
    where = pick_device(device)
    models, places, dataset = load_models(model_dirs, dataset, where)
    images, _ = validation_images(dataset, _LOOKED_AT)
    with staged_dir(output_dir, ("cka.csv", "*.csv", "provenance.json")) as directory:
        result = survey(models, images, dataset, batch_size)
        for name, table in vars(result).items():
            write_csv(directory / f"{name}.csv", table)
        settings = {"dataset": dataset.name, "models": {a: str(p) for a, p in places.items()}}
        write_provenance(directory, settings, this_machine(where))
    typer.echo(
        f"{len(models)} models on {len(images):,} validation images of {dataset.name}: "
        f"similarity of {len(result.cka):,} pairs of layers, {len(result.heads):,} heads"
    )
