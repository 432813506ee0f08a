"""Trained models put to use: test scores of a split, predictions and attention maps of images."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.loading.transforms import to_float
from effvit.errors import UserError
from effvit.evaluation.score import (
    attention_rollout,
    confusion,
    per_class,
    predict_logits,
    predictions,
    summarise,
    worst_mistakes,
)
from effvit.files import write_csv, write_json
from effvit.model.trained_on import TrainedOn
from effvit.model.vit import ViT

_FEW = 5  # names of classes in a message


def check_fits(model: ViT, dataset: PreparedDataset, *, quiet: bool = False) -> PreparedDataset:
    """Return the data set as the model takes it: with the mean and deviation that the model was trained with.

    Those are part of the model: its weights expect images on that scale, whatever the mean of the images that it now
    gets. Where the data set's differ, a line on stderr says so, unless ``quiet``. An older model does not know its own,
    and gets those of the data set.

    Raises:
        UserError: the model was trained for images of another size or for other classes, or for the same in another
            order.
    """
    (height, width), classes = model.config.image_shape, model.config.num_classes
    side, known = dataset.image_size, len(dataset.classes)
    if (height, width, classes) != (side, side, known):
        pixels = f"{height}" if height == width else f"{height} x {width}"
        raise UserError(
            f"the model is for {classes} classes and images of {pixels} pixels, "
            f"{dataset.name} has {known} classes and images of {side} pixels"
        )
    return as_trained_on(model.trained_on, dataset, quiet=quiet)


def as_trained_on(about: TrainedOn, dataset: PreparedDataset, *, quiet: bool = False) -> PreparedDataset:
    """Return the data set with the mean and deviation that a model was trained with, as `check_fits` does.

    Raises:
        UserError: the model was trained for other classes, or for the same in another order.
    """
    if about.classes is not None and about.classes != dataset.classes:
        raise UserError(_which_classes_differ(about.classes, dataset))
    if about.mean is None or about.std is None or (about.mean, about.std) == (dataset.mean, dataset.std):
        return dataset
    if not quiet:
        print(f"{dataset.name}: normalised by the model's own mean and deviation, not the data set's", file=sys.stderr)
    return replace(dataset, mean=about.mean, std=about.std)  # type: ignore[arg-type]


@dataclass(frozen=True)
class View:
    """How image files become what a model takes, and what its classes are called."""

    image_size: int
    storage: str
    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]

    def read(self, paths: Sequence[Path]) -> np.ndarray:
        """Image files as uint8 ``(n, H, W, 3)``; raises ``UserError`` where one is none."""
        from effvit.data.sources.images import load_image

        return np.stack([load_image(path, self.image_size, self.storage) for path in paths])


def view_of(model: ViT, dataset: PreparedDataset | None) -> View:
    """Return how a model sees image files: as those of its data set, or else as it knows itself.

    Raises:
        UserError: the model does not fit the data set; or there is none and the model does not know enough.
    """
    if dataset is not None:
        fitting = check_fits(model, dataset)
        return View(fitting.image_size, fitting.storage, fitting.classes, fitting.mean, fitting.std)
    about, (height, width) = model.trained_on, model.config.image_shape
    if about.mean is None or about.std is None:
        raise UserError("the model does not know how its images were normalised; give the data set of its training")
    if height != width or len(about.mean) != 3:
        raise UserError(
            f"the model takes images of {height} x {width} pixels and {len(about.mean)} channels; "
            "files are read as squares of 3 channels"
        )
    classes = about.classes or [str(index) for index in range(model.config.num_classes)]
    return View(height, "pixels", classes, about.mean, about.std)


def _which_classes_differ(ours: Sequence[str], dataset: PreparedDataset) -> str:
    theirs = dataset.classes
    unknown, missing = ([name for name in a if name not in b] for a, b in ((theirs, ours), (ours, theirs)))
    if unknown or missing:
        return (
            f"the model was trained for other classes than {dataset.name} has: "
            f"{_few(missing) or 'none'} in place of {_few(unknown) or 'none'}"
        )
    index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return (
        f"the model has the classes of {dataset.name} in another order: "
        f"class {index} is {ours[index]}, in {dataset.name} {theirs[index]}"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def score_test_split(
    model: ViT, dataset: PreparedDataset, directory: Path, batch_size: int, worst: int = 0
) -> dict[str, float]:
    """Write evaluation.json, per_class.csv, confusion.csv and predictions.csv of the test split.

    With ``worst``, also worst.png: so many of the wrong predictions, the most confident first. Without mistakes there
    is no such file.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: the model does not fit the data set, or gives logits that are not finite.
    """
    images, labels_array = dataset.split("test")
    labels = torch.from_numpy(labels_array)
    logits = predict_logits(model, images, dataset.mean, dataset.std, batch_size)
    if len(logits) != dataset.counts["test"]:
        raise RuntimeError(f"evaluated {len(logits)} of {dataset.counts['test']} test images")
    if not logits.isfinite().all():
        raise UserError("the model's outputs are not finite numbers")
    scores = summarise(logits, labels)
    write_json(directory / "evaluation.json", scores)
    write_csv(directory / "per_class.csv", per_class(logits, labels, dataset.classes))
    write_csv(directory / "confusion.csv", confusion(logits, labels, dataset.classes))
    files = dataset.files("test")
    write_csv(directory / "predictions.csv", predictions(logits, labels, files))
    rows, confidence = worst_mistakes(logits, labels, worst)
    if len(rows):
        predicted = logits.argmax(dim=1).numpy()
        captions = [
            [
                f"{dataset.classes[labels_array[row]]}, predicted",
                f"{dataset.classes[predicted[row]]} ({share:.1%})",
                files[row] if files else f"test image {row}",
            ]
            for row, share in zip(rows, confidence, strict=True)
        ]
        heading = f"{model.config.attention}: the {len(rows)} most confident mistakes"
        _draw_mistakes(directory / "worst.png", images[rows], captions, heading)
    return scores


def _draw_mistakes(path: Path, images: np.ndarray, captions: Sequence[Sequence[str]], heading: str) -> None:
    from effvit.evaluation.mistakes import mistake_sheet

    figure = mistake_sheet(list(images), captions, heading)
    figure.savefig(path, dpi=120, metadata={"Software": None})


@torch.inference_mode()
def rollout_maps(
    model: ViT, images: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, np.ndarray]:
    """Logits ``(n, classes)`` and attention rollout ``(n, gh, gw)`` of uint8 images ``(n, H, W, 3)``."""
    device = next(model.parameters()).device
    logits, maps = model(to_float(torch.from_numpy(images).to(device), mean, std), output_attentions=True)
    rows, columns = model.config.grid_size
    return logits.float().cpu(), attention_rollout(maps, model.config.prefix_tokens).view(
        -1, rows, columns
    ).cpu().numpy()


def map_test_images(model: ViT, dataset: PreparedDataset, directory: Path, count: int = 6) -> None:
    """Write attention maps of a few test images, the same for every model: safetensors and a picture.

    The images are the first ones of as many classes, spread evenly over the classes.
    """
    from effvit.evaluation.overlay import map_sheet

    images, labels = dataset.split("test")
    classes = np.unique(np.linspace(0, len(dataset.classes) - 1, count).round().astype(int))
    rows = np.array([int(np.argmax(labels == index)) for index in classes])
    logits, maps = rollout_maps(model, images[rows], dataset.mean, dataset.std)
    predicted = logits.argmax(dim=1).numpy()
    arrays = {"images": images[rows], "labels": labels[rows], "predictions": predicted, "maps": maps}
    (directory / "attention_maps.safetensors").write_bytes(save(arrays))
    titles = [
        f"{dataset.classes[label]}\nas {dataset.classes[guess]}"
        for label, guess in zip(labels[rows], predicted, strict=True)
    ]
    figure = map_sheet(list(images[rows]), list(maps), titles, f"{model.config.attention}: attention rollout")
    figure.savefig(directory / "attention_maps.png", dpi=120, metadata={"Software": None})
