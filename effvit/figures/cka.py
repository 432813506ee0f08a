"""Which layers of which mechanisms compute alike."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from effvit.figures.style import CROWD, WIDTH, look, styled

_LOWEST = 0.3  # of the colours: less is as unlike as layers get here
_MOST_NUMBERS = 48  # of layers along a side; of more, each mechanism's first and last


@styled
def cka(table: pd.DataFrame) -> Figure:
    """Linear CKA of one data set between all layers of all mechanisms, each mechanism a block of rows and columns."""
    names = [str(name) for name in pd.unique(table["attention_a"])]
    order = [(a, int(n)) for a in names for n in sorted(set(table.loc[table["attention_a"] == a, "layer_a"]))]
    pairs = table.set_index(["attention_a", "layer_a", "attention_b", "layer_b"])["cka"]
    values = np.array([[pairs.get((*a, *b), np.nan) for b in order] for a in order])
    side = 0.72 * WIDTH
    crowded = len(names) > CROWD
    figure = Figure(figsize=(side + (1.2 if crowded else 0.7), side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=_LOWEST, vmax=1, cmap="cividis", interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    edges = [i - 0.5 for i in range(1, len(order)) if order[i][0] != order[i - 1][0]]
    for edge in edges:
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    blocks = [[i for i, (a, _) in enumerate(order) if a == name] for name in names]
    ends = {place for rows in blocks for place in (rows[0], rows[-1])}
    layers = [str(n) if len(order) <= _MOST_NUMBERS or i in ends else "" for i, (_, n) in enumerate(order)]
    axes.set_xticks(range(len(order)), layers, fontsize=6)
    axes.set_yticks(range(len(order)), layers, fontsize=6)
    axes.tick_params(length=0)
    for name, rows in zip(names, blocks, strict=True):
        label, colour, _ = look(name)
        centre = (rows[0] + rows[-1]) / 2
        across = axes.secondary_xaxis(-0.045)
        across.set_xticks([centre], [label], rotation=40 if crowded else 0, ha="right" if crowded else "center")
        upright = axes.secondary_yaxis(-0.045)
        upright.set_yticks([centre], [label], rotation=0 if crowded else 90, va="center")
        for axis in (across, upright):
            axis.tick_params(length=0, labelcolor=colour, labelsize=6 if crowded else 7)
            axis.spines[:].set_visible(False)
    if len(order) <= 24:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                shade = "black" if value > (1 + _LOWEST) / 2 else "white"
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=5, color=shade)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, extend="min")
    bar.ax.spines[:].set_visible(False)
    bar.set_label(f"Linear CKA, % in cells ({table['n_images'].max():,} validation images)" if len(order) <= 24 else
                  f"Linear CKA ({table['n_images'].max():,} validation images)")  # fmt: skip
    return figure
