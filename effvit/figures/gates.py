"""What a gate lets through.

The last block's gate is not trained: the head reads the class token alone, which the gate does not touch.
"""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from effvit.figures.style import WIDTH, branch_colour, by_mechanism, look, styled


@styled
def gates(table: pd.DataFrame) -> Figure:
    """Share of each branch in the patches' outputs by layer, stacked; a panel for each mechanism with a gate."""
    mechanisms = list(by_mechanism(table))
    figure = Figure(figsize=(WIDTH / 2 * len(mechanisms), 2.6), layout="constrained")
    for axes, (attention, rows) in zip(figure.subplots(1, len(mechanisms), squeeze=False)[0], mechanisms, strict=True):
        branches = [str(branch) for branch in pd.unique(rows["branch"])]
        shares = rows.pivot_table(index="layer", columns="branch", values="share", sort=False)[branches]
        below = shares.cumsum(axis=1) - shares
        for branch in branches:
            bars = axes.bar(shares.index, shares[branch], 0.75, below[branch], color=branch_colour(branch),
                            edgecolor="white", label=branch)  # fmt: skip
            bars[-1].set_hatch("////")
            if len(shares) <= 12:
                axes.bar_label(
                    bars, [f"{100 * share:.0f}" for share in shares[branch]], label_type="center", fontsize=7
                )
        axes.axhline(1, color="0.4", linewidth=0.6)
        axes.grid(False)
        axes.set(xlabel="Layer (start: equal shares; hatched: not trained)", title=look(attention)[0], ylim=(0, 1))
        axes.set_ylabel("Mean share of the gate [%]")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, handlelength=1, columnspacing=1)
    return figure
