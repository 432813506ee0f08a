"""A sheet of images that a model got wrong."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

_COLUMNS = 5
_CELL = (1.9, 2.3)  # inches: an image with three lines of text below it
_MOST_LETTERS = 34  # of a line


def mistake_sheet(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], heading: str) -> Figure:
    """Draw uint8 images ``(H, W, 3)`` in rows of five, the lines of each one's caption below it."""
    columns = min(_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(max(columns, 2) * _CELL[0], rows * _CELL[1] + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_visible(False)
    for axes, image, lines in zip(grid.flat, images, captions, strict=False):  # the last row may be short
        axes.set_visible(True)
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel("\n".join(map(_shortened, lines)), fontsize=7, parse_math=False)
    figure.suptitle(heading, fontsize=10, parse_math=False)
    return figure


def _shortened(line: str) -> str:
    """One line of printable text; of a long one the end, which tells files apart."""
    text = "".join(letter if letter.isprintable() else "?" for letter in line)
    return text if len(text) <= _MOST_LETTERS else f"…{text[1 - _MOST_LETTERS :]}"
