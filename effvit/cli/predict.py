"""``effvit predict``."""

from typing import Annotated

import typer

from effvit.cli import options


def predict(
    images: options.Images,
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDirIfNeeded = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name per image.")] = 3,
    device: options.Device = "auto",
) -> None:
    """Name the classes of image files, most likely first.

    The model records its classes and normalisation. If a data set is given, both must match it.
    """
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device
    from effvit.evaluation.predict import view_of
    from effvit.evaluation.score import predict_logits
    from effvit.model.checkpoint import load_model

    model = load_model(model_dir, pick_device(device))
    view = view_of(model, PreparedDataset.load(dataset_dir) if dataset_dir else None)
    probabilities = predict_logits(model, view.read(images), view.mean, view.std, 64).softmax(dim=1)
    for path, row in zip(images, probabilities, strict=True):
        best = row.topk(min(top, len(row)))
        named = (f"{view.classes[i]} {p:.1%}" for p, i in zip(best.values.tolist(), best.indices, strict=True))
        typer.echo(f"{path}: {', '.join(named)}")
