"""Trained models looked into: several that differ in attention alone, on the same validation images.

The test split is for `effvit evaluate`; what is looked at here may be looked at as often as one likes.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.loading.transforms import to_float
from effvit.errors import UserError
from effvit.evaluation.predict import check_fits
from effvit.evaluation.score import predict_logits, top_k_accuracy
from effvit.model.checkpoint import load_model
from effvit.model.vit import ViT

_OF_ATTENTION = {"attention", "attention_options"}


def load_models(
    directories: Sequence[Path], dataset: PreparedDataset, device: torch.device
) -> tuple[dict[str, ViT], dict[str, Path], PreparedDataset]:
    """Models and their directories by mechanism, in the order given, and the data set as they take it.

    Raises:
        UserError: two of one mechanism, models that differ in more than attention, one that does not fit the data, has
            more or fewer prefix tokens than a class token, or whose weights are not finite.
    """
    models: dict[str, ViT] = {}
    places: dict[str, Path] = {}
    seen: list[PreparedDataset] = []
    for directory in directories:
        model = load_model(directory, device)
        if model.config.prefix_tokens != 1:
            raise UserError(
                f"{directory}: a model with prefix_tokens={model.config.prefix_tokens}; "
                "expected 1, the class token, whose attention is looked at"
            )
        seen.append(check_fits(model, dataset, quiet=bool(seen)))
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise UserError(f"{directory}: weights that are not finite numbers, expected those of a whole training")
        attention = model.config.attention
        if attention in models:
            raise UserError(f"{directory}: a second model with {attention}; expected one of each mechanism")
        models[attention], places[attention] = model, directory
        first = next(iter(models.values())).config.model_dump(exclude=_OF_ATTENTION)
        for key, value in model.config.model_dump(exclude=_OF_ATTENTION).items():
            if value != first[key]:
                raise UserError(
                    f"{directory}: a model with {key}={value}, the first one has {first[key]}; "
                    "expected models that differ in attention alone"
                )
        if (seen[-1].mean, seen[-1].std) != (seen[0].mean, seen[0].std):
            raise UserError(
                f"{directory}: a model trained with another mean and deviation of images than the first one; "
                "expected models that differ in attention alone"
            )
    return models, places, seen[0]


def validation_images(dataset: PreparedDataset, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many validation images, evenly spaced: uint8 ``(n, H, W, 3)`` and int64 labels ``(n,)``."""
    images, labels = dataset.split("validation")
    if not len(labels):
        raise UserError(f"{dataset.name}: no validation images")
    rows = np.linspace(0, len(labels) - 1, min(most, len(labels))).round().astype(int)
    return images[rows], labels[rows]


def few_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows of the first image each of so many classes, spread evenly over the classes that there are."""
    classes = np.unique(labels)
    chosen = np.unique(np.linspace(0, len(classes) - 1, count).round().astype(int))
    return np.array([int(np.argmax(labels == label)) for label in classes[chosen]])


def normalised(model: ViT, images: np.ndarray, dataset: PreparedDataset) -> Tensor:
    """Images ``(n, H, W, 3)`` as the model takes them, where it is."""
    device = next(model.parameters()).device
    return to_float(torch.from_numpy(images).to(device), dataset.mean, dataset.std)


def accuracy(model: ViT, images: np.ndarray, labels: np.ndarray, dataset: PreparedDataset) -> float:
    """Top-1 accuracy as a fraction; the model is in eval mode."""
    logits = predict_logits(model, images, dataset.mean, dataset.std, batch_size=256)
    return top_k_accuracy(logits, torch.from_numpy(labels), 1)


@contextmanager
def recorded(inputs_of: Sequence[nn.Module] = (), outputs_of: Sequence[nn.Module] = ()) -> Iterator[list[Tensor]]:
    """Yield a list that fills, while the modules run, with the first input or output of each, in order of the calls."""
    seen: list[Tensor] = []

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    with ExitStack() as stack:
        for module in inputs_of:
            stack.enter_context(module.register_forward_pre_hook(lambda _, inputs: seen.append(first(inputs))))
        for module in outputs_of:
            stack.enter_context(module.register_forward_hook(lambda _, __, output: seen.append(first(output))))
        yield seen
