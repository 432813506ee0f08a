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
    note = "Attention rollout from the class token, brightest where it is largest; wrong predictions in bold"
    figure.supxlabel(note, fontsize=7)
    return figure


@styled
def class_token_maps(arrays: Mapping[str, np.ndarray], attentions: Sequence[str], classes: Sequence[str]) -> Figure:
    """Rollout through all blocks and, below it, the last block's class-token row of the same images.

    Args:
        arrays: `images` (n, H, W, 3), `labels` (n,), and `<name>.predictions` (n,), `<name>.rollout` and
            `<name>.class_token` (n, gh, gw) of each mechanism.
        attentions: the mechanisms, a column each.
        classes: class names by label.
    """
    count, side = len(arrays["images"]), min(WIDTH / (len(attentions) + 1), 1.2)
    height = _room_above(len(attentions)) + 2 * count * (side + 0.09)
    figure = Figure(figsize=((len(attentions) + 1) * side, height), layout="constrained")
    grid = figure.subplots(2 * count, len(attentions) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    grid[0, 0].set_title("Image")
    for i, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        for line, name, place in zip(grid[2 * i : 2 * i + 2], ("rollout", "class_token"), (0, 1), strict=True):
            line[0].imshow(image, interpolation="nearest")
            line[0].set_ylabel(("rollout", "class token")[place], fontsize=6 if len(attentions) > CROWD else 7)
            for axes, attention in zip(line[1:], attentions, strict=True):
                axes.imshow(overlay(image, arrays[f"{attention}.{name}"][i]), interpolation="nearest")
                if i == place == 0:
                    _head(axes, attention, len(attentions))
                if place:
                    predicted = arrays[f"{attention}.predictions"][i]
                    verdict = {} if predicted == label else {"color": "#D55E00", "weight": "bold"}
                    axes.set_xlabel(classes[predicted], fontsize=7, parse_math=False, **verdict)
        grid[2 * i + 1, 0].set_xlabel(classes[label], fontsize=7, parse_math=False)
    figure.supxlabel(
        "Rollout through all blocks; class-token row of the last block's matrix, heads averaged (implied for linear "
        "mechanisms).\nBrightest where largest; wrong predictions in bold",
        fontsize=7,
    )
    return figure


def _room_above(columns: int) -> float:
    """Inches for names and the note."""
    return 1.3 if columns > CROWD else 0.5


def _head(axes: Axes, attention: str, columns: int) -> None:
    """Put a mechanism's name over its column, upright where columns are narrow."""
    upright: dict[str, Any] = {"rotation": 90, "fontsize": 7} if columns > CROWD else {}
    axes.set_title(look(attention)[0], **upright)
