"""Where the class token looks."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from effvit.figures.style import WIDTH, look, styled
from effvit.overlay import overlay


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
