"""Accuracy against what it costs."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from effvit.analysis.pareto import pareto_front
from effvit.figures.style import WIDTH, legend, look, styled


@styled
def accuracy_tradeoff(tradeoff: pd.DataFrame) -> Figure:
    """Test accuracy of one data set against MACs, latency and training memory.

    With the Pareto front in grey, where the intervals of the accuracies along it do not overlap.

    Latency is the ratio to `fused`, timed in turns with it in one process, and its 95 % interval: times of different
    processes do not compare.
    """
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    batch = "/".join(f"{size}" for size in pd.unique(tradeoff["batch_size"].dropna()))
    costs = {
        "mmacs": "Computation [MMACs/image]",
        "latency_ratio": f"Latency [× Fused, batch {batch}]",
        "train_memory_mib": f"Training memory [MiB, batch {batch}]",
    }
    table = tradeoff.assign(mmacs=tradeoff["gmacs"] * 1e3)
    panels = figure.subplots(1, len(costs), sharey=True)
    drawn: list[Line2D] = []
    for axes, (column, label) in zip(panels, costs.items(), strict=True):
        axes.set(xscale="log", xlabel=label)  # costs compare as ratios
        known = table.dropna(subset=[column, "top1"])
        if known.empty:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
            continue
        front = known[pareto_front(known[column], known["top1"])].sort_values(column)
        if _apart(front):
            axes.plot(front[column], front["top1"], color="0.82", linewidth=3, drawstyle="steps-post", zorder=1)
            drawn = [Line2D([], [], color="0.82", linewidth=3, label="Pareto front")]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": "0.6", "elinewidth": 0.8, "capsize": 2}
        thin = {"elinewidth": 0.7, "capsize": 0, "zorder": 1.5}
        axes.errorbar(known[column], known["top1"], _interval(known, "top1"), **bars)
        by_image = axes.errorbar(known[column], known["top1"], _interval(known, "top1_images", "top1"), **bars | thin)
        for line in by_image.lines[2]:
            line.set_linestyle(":")
        if column == "latency_ratio":
            axes.errorbar(known[column], known["top1"], xerr=_interval(known, column), **bars)
        for attention, cost, top1 in zip(known["attention"], known[column], known["top1"], strict=True):
            _, colour, marker = look(attention)
            # see-through, so that a point upon another hides nothing
            axes.plot(cost, top1, marker, color=(colour, 0.35), markersize=7.5, markeredgecolor=colour)
        wide = known[column].max() > 5 * known[column].min()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set(minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:g}"))
        axes.margins(x=0.12, y=0.12)
    panels[0].set_ylabel("Test accuracy (top-1)")
    panels[0].yaxis.set(major_locator=MaxNLocator(6), major_formatter=StrMethodFormatter("{x:.1%}"))
    legend(figure, tradeoff, drawn)
    if tradeoff["top1_images_low"].notna().any():
        note = "One seed. Dotted: 95 % interval of each model over test images (Wilson), without seed-to-seed variation"
        figure.supxlabel(note, fontsize=7)
    return figure


def _apart(front: pd.DataFrame) -> bool:
    """Whether each model on the front is more accurate than the one before, beyond both intervals."""
    low, high = (front[f"top1_{end}"].fillna(front[f"top1_images_{end}"]).tolist() for end in ("low", "high"))
    return len(front) > 1 and all(low[i + 1] > high[i] for i in range(len(front) - 1))


def _interval(table: pd.DataFrame, name: str, column: str | None = None) -> list["pd.Series[float]"]:
    """Lengths of the error bars below and above a column, from the ends of the interval called `name`."""
    value = table[column or name]
    return [value - table[f"{name}_low"], table[f"{name}_high"] - value]
