"""Where the class token looks."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from effvit.evaluation.overlay import overlay
from effvit.figures.style import WIDTH, look, styled


@styled
def attention_maps(maps: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str]) -> Figure:
    """Attention rollout from the class token over the same images, a column a mechanism, predictions below.

    Args:
        maps: per mechanism `images` (n, H, W, 3) uint8, `labels` and `predictions` (n,), `maps` (n, gh, gw).
        classes: class names by label.
    """
    first = next(iter(maps.values()))
    count, side = len(first["images"]), min(WIDTH / (len(maps) + 1), 1.4)
    figure = Figure(figsize=((len(maps) + 1) * side, 0.5 + count * (side + 0.15)), layout="constrained")
    grid = figure.subplots(count, len(maps) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, label in zip(grid[:, 0], first["images"], first["labels"], strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(classes[label], fontsize=7, parse_math=False)
    grid[0, 0].set_title("Image")
    for column, (attention, arrays) in zip(grid.T[1:], maps.items(), strict=True):
        column[0].set_title(look(attention)[0])
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
    figure = Figure(figsize=((len(attentions) + 1) * side, 0.5 + 2 * count * (side + 0.09)), layout="constrained")
    grid = figure.subplots(2 * count, len(attentions) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    grid[0, 0].set_title("Image")
    for i, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        for line, name, place in zip(grid[2 * i : 2 * i + 2], ("rollout", "class_token"), (0, 1), strict=True):
            line[0].imshow(image, interpolation="nearest")
            line[0].set_ylabel(("rollout", "class token")[place], fontsize=7)
            for axes, attention in zip(line[1:], attentions, strict=True):
                axes.imshow(overlay(image, arrays[f"{attention}.{name}"][i]), interpolation="nearest")
                if i == place == 0:
                    axes.set_title(look(attention)[0])
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
