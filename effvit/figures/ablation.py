"""The hybrid's branches: what each set gives and costs, and which share each branch has."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from effvit.figures.style import WIDTH, branch_colour, look, styled

_SHARES = {"heads": "Share of heads", "gate": "Mean gate share"}


@styled
def ablation(accuracy: pd.DataFrame, cost: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """One data set's sets of branches: test accuracy, computation, latency with 95 % intervals; shares by layer.

    Accuracy's interval is over seeds, or over test images where there is one seed.
    """
    table = accuracy.merge(cost, on=["dataset", "branches"])
    table = table.assign(mmacs=table["gmacs"] * 1e3)
    several = [str(branches) for branches in table["branches"] if branches in set(shares["branches"])]
    figure = Figure(figsize=(WIDTH, 3.0 + (1.9 if several else 0)), layout="constrained")
    heights = [3.0, 1.9] if several else [3.0]
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = upper.subplots(1, 3, sharey=True)
    _, colour, marker = look("hybrid")
    y = np.arange(len(table))
    batch = table["batch_size"].iloc[0]
    n_seeds, n_images = table["n_seeds"].iloc[0], table["n_images"].iloc[0]
    of = f"{n_seeds} seeds" if n_seeds > 1 else f"n = {n_images:,} images"
    columns = {
        "top1": f"Test top-1 [{of}]",
        "mmacs": "Computation [MMACs/image]",
        "latency_ratio": f"Latency [× Fused, batch {batch}]",
    }
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        if f"{column}_low" in table:
            ends = [table[column] - table[f"{column}_low"], table[f"{column}_high"] - table[column]]
            axes.errorbar(table[column], y, xerr=ends, fmt="none", ecolor="0.6", elinewidth=0.9, capsize=2)
        axes.plot(table[column], y, marker, color=(colour, 0.35), markersize=7, markeredgecolor=colour, linestyle="")
        axes.set(xlabel=label, yticks=y, ylim=(len(table) - 0.5, -0.5))
        axes.set_yticklabels([str(branches).replace("+", " + ") for branches in table["branches"]])
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    panels[0].xaxis.set_major_formatter(StrMethodFormatter("{x:.1%}"))
    if several:
        _shares(lower[0], shares, several)
    return figure


def _shares(figure: SubFigure, table: pd.DataFrame, sets: list[str]) -> None:
    colours = {str(branch): branch_colour(str(branch)) for branch in pd.unique(table["branch"])}
    for axes, branches in zip(np.atleast_1d(figure.subplots(1, len(sets), sharey=True)), sets, strict=True):
        shares = table[table["branches"] == branches].pivot(index="layer", columns="branch", values="share").fillna(0)
        bottom = np.zeros(len(shares))
        for branch in (name for name in colours if name in shares):
            axes.bar(shares.index, shares[branch], bottom=bottom, color=colours[branch], width=0.7)
            bottom = bottom + shares[branch].to_numpy()
        axes.set(xlabel="Layer", ylim=(0, 1), xticks=shares.index)
        axes.set_title(branches.replace("+", " + "), fontsize=7)
        axes.xaxis.grid(False)
    figure.axes[0].set_ylabel(_SHARES[str(table["of"].iloc[0])])
    handles = [Patch(color=colour, label=branch) for branch, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
