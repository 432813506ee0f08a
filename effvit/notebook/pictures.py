"""Sample images and attention maps as matplotlib figures, which need no display."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.notebook.inputs import Images, as_inputs, as_pictures, first_batch, known, read_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Labels: TypeAlias = Sequence[int] | np.ndarray | Tensor
_COLUMNS = 8
_INCHES = 1.1


def visualize_images(
    images: Images | PreparedDataset | DataLoader[Any],
    labels: Labels | None = None,
    *,
    count: int = 8,
    data: PreparedDataset | None = None,
) -> "Figure":
    """Draw sample images with their classes.

    Args:
        images: a prepared data set, for the first training images of each class; the first batch of a loader; or uint8
            ``(n, H, W, 3)``, floats ``(n, channels, H, W)``, or a list of image files.
        labels: class of each image.
        count: images at most; of each class where it is a prepared data set with up to 20 classes.
        data: prepared data set that the images are of, for names of classes and normalisation. Floats are otherwise
            stretched from black to white, each image by itself.

    Raises:
        UserError: images or labels that are something else.
    """
    from matplotlib.figure import Figure

    _require_count(count)
    if isinstance(images, PreparedDataset):
        from effvit.data.samples import sample_sheet

        return sample_sheet(images, count)
    shown, numbers = _some(images, labels, count, data)
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(columns * _INCHES, rows * (_INCHES + 0.2)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    titles = _named(numbers, known("classes", None, data)) or [""] * len(shown)
    for axis, picture, title in zip(axes.flat, as_pictures(shown, None, data), titles, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8, parse_math=False)
    return figure


def visualize_attention(
    model: nn.Module,
    images: Images | PreparedDataset | DataLoader[Any],
    labels: Labels | None = None,
    *,
    count: int = 6,
    data: PreparedDataset | None = None,
) -> "Figure":
    """Draw where a model looks: attention rollout laid over each image, what it is and what it was taken for above.

    The model is a `ViT`, or one whose attention has been swapped in all blocks.

    Args:
        model: used where it is, in eval mode.
        images: a prepared data set, for validation images of different classes; or as in `visualize_images`.
        labels: class of each image.
        count: images at most.
        data: prepared data set that the model was trained on, for names and normalisation that it does not know itself.

    Raises:
        UserError: images or labels that are something else, or a model without attention maps.
    """
    from effvit.evaluation.overlay import map_sheet
    from effvit.notebook.rollout import mechanisms_of, rollout

    _require_count(count)
    if isinstance(images, PreparedDataset):
        data = images
        images, labels = _of_different_classes(images, count)
    shown, numbers = _some(images, labels, count, data, model)
    logits, maps = rollout(model, as_inputs(shown, model, data))
    classes = known("classes", model, data)
    guesses = _named(logits.argmax(dim=1).tolist(), classes)
    actual = _named(numbers, classes)
    titles = [f"as {guess}" for guess in guesses]
    if actual:
        titles = [f"{label}\n{title}" for label, title in zip(actual, titles, strict=True)]
    return map_sheet(
        list(as_pictures(shown, model, data)), list(maps), titles, f"{mechanisms_of(model)}: attention rollout"
    )


def _require_count(count: int) -> None:
    if count < 1:
        raise UserError(f"count={count}: expected at least 1")


def _of_different_classes(dataset: PreparedDataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation images of as many classes, spread evenly over the classes, and labels."""
    from effvit.evaluation.probe import few_classes

    images, labels = dataset.split("validation")
    rows = few_classes(labels, count)
    return images[rows], labels[rows]


def _some(
    images: Images | DataLoader[Any],
    labels: Labels | None,
    count: int,
    data: PreparedDataset | None,
    model: nn.Module | None = None,
) -> tuple[Tensor, list[int]]:
    """The first ``count`` images, and their labels if there are any."""
    if isinstance(images, DataLoader):
        if labels is not None:
            raise UserError("labels: leave them out with a loader, which has its own")
        read, labels = first_batch(images)
    else:
        read = read_images(images, data, model)
    if labels is None:
        return read[:count], []
    numbers = torch.as_tensor(labels).tolist()
    if not isinstance(numbers, list) or len(numbers) != len(read):
        raise UserError(f"labels: expected one for each of {len(read)} images")
    return read[:count], numbers[:count]


def _named(numbers: list[int], classes: Sequence[str] | None) -> list[str]:
    if classes is None:
        return [str(number) for number in numbers]
    if wrong := [number for number in numbers if not 0 <= number < len(classes)]:
        raise UserError(f"labels: has {wrong[0]}, expected 0 to {len(classes) - 1}")
    return [classes[number] for number in numbers]
