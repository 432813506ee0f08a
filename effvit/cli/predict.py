"""``effvit predict``."""

from typing import Annotated

import typer

from effvit.cli import options


def predict(
    images: options.Images,
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDir,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 3,
    device: options.Device = "auto",
) -> None:
    """Name the classes of image files, most likely first.

    The prepared data set gives the class names and the normalisation that the model was trained with.
    """
    import numpy as np

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.data.sources.images import load_image
    from effvit.device import pick_device
    from effvit.evaluation.predict import check_fits
    from effvit.evaluation.score import predict_logits
    from effvit.model.checkpoint import load_model

    model = load_model(model_dir, pick_device(device))
    dataset = PreparedDataset.load(dataset_dir)
    dataset = check_fits(model, dataset)
    batch = np.stack([load_image(path, dataset.image_size, dataset.storage) for path in images])
    probabilities = predict_logits(model, batch, dataset.mean, dataset.std, 64).softmax(dim=1)
    for path, row in zip(images, probabilities, strict=True):
        best = row.topk(min(top, len(row)))
        named = (f"{dataset.classes[i]} {p:.1%}" for p, i in zip(best.values.tolist(), best.indices, strict=True))
        typer.echo(f"{path}: {', '.join(named)}")
