"""Where the class token looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effvit.evaluation.overlay import overlay
from effvit.figures.style import CROWD, WIDTH, look, styled


@styled
def attention_maps(maps: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str]) -> Figure:
    """Attention rollout from the class token over the same images, a column a mechanism, predictions below.

    Args:
        maps: per mechanism `images` (n, H, W, 3) uint8, `labels` and `predictions` (n,), `maps` (n, gh, gw).
        classes: class names by label.
    """
    first = next(iter(maps.values()))
    count, side = len(first["images"]), min(WIDTH / (len(maps) + 1), 1.4)
    height = _room_above(len(maps)) + count * (side + 0.15)
    figure = Figure(figsize=((len(maps) + 1) * side, height), layout="constrained")
    grid = figure.subplots(count, len(maps) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, label in zip(grid[:, 0], first["images"], first["labels"], strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(classes[label], fontsize=7, parse_math=False)
    grid[0, 0].set_title("Image")
    for column, (attention, arrays) in zip(grid.T[1:], maps.items(), strict=True):
        _head(column[0], attention, len(maps))
        rows = zip(column, *(arrays[key] for key in ("images", "maps", "labels", "predictions")), strict=True)
        for axes, image, attended, label, predicted in rows:
            axes.imshow(overlay(image, attended), interpolation="nearest")
            verdict = {} if predicted == label else {"color": "#D55E00", "weight": "bold"}
            axes.set_xlabel(classes[predicted], fontsize=7, parse_math=False, **verdict)
    note = (
        "Attention rollout from the class token, brightest where it is largest; wrong predictions in bold\n"
        "Bars (Nyströmformer's convolution) and spots (Linformer's projections) belong to the implied matrix"
    )
    figure.supxlabel(note, fontsize=7)
    return figure


def _room_above(columns: int) -> float:
    """Inches for names and the note."""
    return 1.3 if columns > CROWD else 0.5


def _head(axes: Axes, attention: str, columns: int) -> None:
    """Put a mechanism's name over its column, upright where columns are narrow."""
    upright: dict[str, Any] = {"rotation": 90, "fontsize": 7} if columns > CROWD else {}
    axes.set_title(look(attention)[0], **upright)
