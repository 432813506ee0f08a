"""Which classes are taken for which."""

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from effvit.figures.style import by_mechanism, look, styled


@styled
def confusion(table: pd.DataFrame) -> Figure:
    """Share of each actual class by predicted class for one data set, a panel a mechanism, all seeds together."""
    classes = list(pd.unique(pd.concat([table["actual"], table["predicted"]])))
    mechanisms = list(by_mechanism(table))
    columns = min(3, len(mechanisms))
    lines = -(-len(mechanisms) // columns)
    figure = Figure(figsize=(0.9 + 2.03 * columns, 0.5 + 2.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes in grid:
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_visible(False)
    for axes, (attention, rows) in zip(grid, mechanisms, strict=False):
        pairs = rows.pivot_table("count", "actual", "predicted", aggfunc="sum", fill_value=0)
        counts = pairs.reindex(index=classes, columns=classes, fill_value=0).to_numpy(dtype=float)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.set_visible(True)
        # the power brings out the few per cent that are wrong
        picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.4, 0, 1), interpolation="nearest")
        axes.set_title(f"{look(attention)[0]}: {counts.trace() / counts.sum():.1%} correct")
        if len(classes) <= 12:
            axes.set_xticks(
                range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, parse_math=False
            )
            axes.set_yticks(range(len(classes)), classes, parse_math=False)
            for i, j in np.argwhere(share >= 0.005):
                colour = "white" if share[i, j] > 0.4 else "black"
                axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=5.5, color=colour)
    for axes in grid[len(mechanisms) - columns : len(mechanisms)]:  # the last line may be short
        axes.tick_params(labelbottom=True)
    figure.supxlabel("Predicted class", fontsize=8)
    figure.supylabel("Actual class", fontsize=8)
    bar = figure.colorbar(picture, ax=grid, aspect=40, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("Share of the actual class")
    return figure
