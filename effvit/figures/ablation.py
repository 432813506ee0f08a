"""The hybrid's branches: what each set gives and costs, and how its gate weighs them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from effvit.figures.style import WIDTH, look, styled

_SHADES = ("#CC79A7", "#7F4C68", "#E8C4D8", "#4D2E3F", "#B39FAA")  # of the hybrid's own colour


@styled
def ablation(accuracy: pd.DataFrame, cost: pd.DataFrame, gates: pd.DataFrame) -> Figure:
    """One data set's sets of branches: test accuracy, computation, latency with 95 % intervals; gate shares by layer.

    Accuracy's interval is over seeds, or over test images where there is one seed.
    """
    table = accuracy.merge(cost, on=["dataset", "branches"])
    table = table.assign(mmacs=table["gmacs"] * 1e3)
    gated = [str(branches) for branches in table["branches"] if branches in set(gates["branches"])]
    figure = Figure(figsize=(WIDTH, 3.0 + (1.9 if gated else 0)), layout="constrained")
    upper, *lower = figure.subfigures(2 if gated else 1, 1, height_ratios=[3.0, 1.9] if gated else None, squeeze=False)[
        :, 0
    ]
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
    if gated:
        _gates(lower[0], gates, gated)
    return figure


def _gates(figure: SubFigure, gates: pd.DataFrame, sets: list[str]) -> None:
    shades = dict(zip(pd.unique(gates["branch"]), _SHADES, strict=False))
    for axes, branches in zip(np.atleast_1d(figure.subplots(1, len(sets), sharey=True)), sets, strict=True):
        shares = gates[gates["branches"] == branches].pivot(index="layer", columns="branch", values="share")
        bottom = np.zeros(len(shares))
        for branch in (name for name in shades if name in shares):
            axes.bar(shares.index, shares[branch], bottom=bottom, color=shades[branch], width=0.7)
            bottom = bottom + shares[branch].to_numpy()
        axes.set(xlabel="Layer", ylim=(0, 1), xticks=shares.index)
        axes.set_title(branches.replace("+", " + "), fontsize=7)
        axes.xaxis.grid(False)
    figure.axes[0].set_ylabel("Mean gate share")
    handles = [Patch(color=shade, label=branch) for branch, shade in shades.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
