"""A labelled sheet of sample images."""

import math

import numpy as np
from matplotlib.figure import Figure

from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError

_MOST_ROWS = 20
_INCHES = 0.8  # height and width of an image in a row
_GRID_INCHES = (1.1, 1.2)  # width and height of a grid's cell: an image with the name of its class above


def sample_sheet(dataset: PreparedDataset, per_class: int) -> Figure:
    """Draw the first training images of each class; nothing is left to chance.

    Up to 20 classes have a row of ``per_class`` images each; with more, the sheet is a grid of one image a class.
    Raises `UserError` if ``per_class`` is less than 1.
    """
    if per_class < 1:
        raise UserError(f"per_class={per_class}: expected at least 1")
    if len(dataset.classes) <= _MOST_ROWS:
        return _draw_rows(dataset, _first_images(dataset, per_class))
    return _draw_grid(dataset, _first_images(dataset, 1))


def _first_images(dataset: PreparedDataset, per_class: int) -> list[np.ndarray]:
    images, labels = dataset.split("train")
    return [images[np.flatnonzero(labels == label)[:per_class]] for label in range(len(dataset.classes))]


def _draw_rows(dataset: PreparedDataset, rows: list[np.ndarray]) -> Figure:
    figure, axes = _blank_sheet(len(rows), max(len(row) for row in rows), (_INCHES, _INCHES))
    for name, row, images in zip(dataset.classes, axes, rows, strict=True):
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, ha="right", va="center", parse_math=False)
        for cell, image in zip(row, images, strict=False):  # a class may have fewer images than there are columns
            cell.imshow(image)
    return figure


def _draw_grid(dataset: PreparedDataset, samples: list[np.ndarray]) -> Figure:
    columns = math.ceil(math.sqrt(len(samples)))
    figure, axes = _blank_sheet(math.ceil(len(samples) / columns), columns, _GRID_INCHES)
    for name, cell, images in zip(dataset.classes, axes.flat, samples, strict=False):  # the last row may be short
        cell.imshow(images[0])
        cell.set_title(name, fontsize=7, pad=2, parse_math=False)
    return figure


def _blank_sheet(rows: int, columns: int, cell: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(columns * cell[0], rows * cell[1]))
    gaps = {"wspace": 0.08, "hspace": 0.08}
    axes = np.array(figure.subplots(rows, columns, squeeze=False, gridspec_kw=gaps))
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes
