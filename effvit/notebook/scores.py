"""What a model gets right, and what it takes images for."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effvit.data.loading.loaders import checked_batches
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.evaluation.predict import as_trained_on, check_fits
from effvit.evaluation.score import predict_logits, summarise
from effvit.model.logits import logits_of
from effvit.model.vit import ViT
from effvit.notebook.inputs import (
    Images,
    as_inputs,
    check_classes,
    device_of,
    evaluating,
    known,
    read_images,
    require_batch_size,
    require_module,
    trained_on,
)

if TYPE_CHECKING:
    import pandas as pd


def evaluate(model: nn.Module, data: PreparedDataset | DataLoader[Any], *, batch_size: int = 256) -> dict[str, float]:
    """Score a model on the test split of a prepared data set, or on all that a loader gives.

    Args:
        model: an image classifier, scored where it is, in eval mode.
        data: prepared; or gives normalised images ``(B, channels, H, W)`` and labels ``(B,)``.
        batch_size: images at once, of a prepared data set.

    Returns:
        ``top1``, ``top5`` and ``ece`` (calibration error) as fractions, ``loss`` in nats, ``num_images``.

    Raises:
        UserError: a model or data that is something else or do not fit each other, or outputs that are not finite.
    """
    require_module(model)
    require_batch_size(batch_size)
    with evaluating(model):
        if isinstance(data, PreparedDataset):
            if isinstance(model, ViT):
                data = check_fits(model, data)
            else:
                check_classes(model, data)
                data = as_trained_on(trained_on(model), data)
            images, numbers = data.split("test")
            logits, labels = predict_logits(model, images, data.mean, data.std, batch_size), torch.from_numpy(numbers)
        else:
            logits, labels = _logits_of_loader(model, data)
    if not logits.isfinite().all():
        raise UserError("the model's outputs are not finite numbers")
    return summarise(logits, labels)


@torch.inference_mode()
def predict(
    model: nn.Module, images: Images, data: PreparedDataset | None = None, *, batch_size: int = 256
) -> "pd.DataFrame":
    """Name the most likely class of each image.

    Args:
        model: an image classifier, used where it is, in eval mode.
        images: uint8 ``(n, H, W, 3)``, normalised floats ``(n, channels, H, W)``, or a list of image files.
        data: prepared data set that the model was trained on, for names and normalisation that it does not know itself.
        batch_size: images at once.

    Returns:
        A row for each image: ``class``, by its name or else its number, and ``probability``.

    Raises:
        UserError: a model or images that are something else, images that cannot be normalised as nothing says how, or
            numbers that are not finite, in images or outputs.
    """
    import pandas as pd

    require_module(model)
    require_batch_size(batch_size)
    read = read_images(images, data, model)
    with evaluating(model):
        logits = torch.cat([logits_of(model(as_inputs(part, model, data))).cpu() for part in read.split(batch_size)])
    if not logits.isfinite().all():
        raise UserError("the model's outputs are not finite numbers")
    best = logits.float().softmax(dim=1).max(dim=1)
    names = known("classes", model, data)
    if names is not None and len(names) != logits.shape[1]:
        raise UserError(f"the model tells {logits.shape[1]} classes apart, and has names of {len(names)}")
    numbers = best.indices.tolist()
    return pd.DataFrame(
        {"class": numbers if names is None else [names[i] for i in numbers], "probability": best.values.numpy()}
    )


@torch.inference_mode()
def _logits_of_loader(model: nn.Module, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Logits ``(n, classes)`` and labels ``(n,)`` on the CPU."""
    logits, labels = [], []
    for images, of_batch in checked_batches(loader, "data"):
        logits.append(logits_of(model(images.to(device_of(model), torch.float32))).float().cpu())
        labels.append(of_batch.cpu())
    if not logits:
        raise UserError("data: the loader gives no batches")
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    if all_logits.ndim != 2 or len(all_logits) != len(all_labels):
        raise UserError(f"the model returns {tuple(all_logits.shape)} for {len(all_labels)} images, expected logits")
    if (largest := int(all_labels.max())) >= all_logits.shape[1]:
        raise UserError(f"data: has label {largest}, the model has {all_logits.shape[1]} classes")
    return all_logits, all_labels
