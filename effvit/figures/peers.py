"""The picture of ``effvit bench-peers``."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from effvit.figures.style import WIDTH, by_mechanism, legend, look, styled

_TITLES = {"forward": "Forward pass", "train": "Forward and backward pass"}


@styled
def peer_ratios(table: pd.DataFrame) -> Figure:
    """Time of the public module over time of ours against sequence length: a panel a width and mode.

    Bars are 95 % intervals of the median ratio; above the line at 1 ours is faster.
    """
    widths, modes = pd.unique(table["hidden_size"]), pd.unique(table["mode"])
    figure = Figure(figsize=(WIDTH, 2.5 * len(widths)), layout="constrained")
    panels = figure.subplots(len(widths), len(modes), sharex=True, sharey=True, squeeze=False)
    for line, width in zip(panels, widths, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            rows = table[(table["hidden_size"] == width) & (table["mode"] == mode)]
            axes.axhline(1, color="0.4", linewidth=1)
            for attention, mine in by_mechanism(rows):
                _, colour, marker = look(attention)
                # Too few rounds have no interval, hence no bar.
                below, above = mine["ratio"] - mine["ratio_low"], mine["ratio_high"] - mine["ratio"]
                errors = [below.fillna(0), above.fillna(0)]
                axes.errorbar(mine["tokens"], mine["ratio"], errors, color=colour, marker=marker, elinewidth=0.8)
            heads = rows["num_attention_heads"].iloc[0]
            axes.set(xscale="log", yscale="log", title=f"{_TITLES[mode]}, width {width}, {heads} heads")
            tokens = pd.unique(table["tokens"])
            axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yticks([0.7, 1, 1.5, 2, 3])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        line[0].set_ylabel("Public module / ours, time")
    for axes in panels[-1]:
        axes.set_xlabel("Sequence length [tokens]")
    legend(figure, table)
    return figure
