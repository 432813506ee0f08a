"""How far and how broadly heads look."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from effvit.figures.style import WIDTH, by_mechanism, legend, look, styled

_QUANTITIES = {"distance_px": "Attention distance [pixels]", "entropy_nats": "Attention entropy [nats]"}


@styled
def heads(table: pd.DataFrame) -> Figure:
    """Attention distance and entropy of each head of one data set by layer: a point a head, a line for their mean."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    for axes, (column, name) in zip(figure.subplots(1, 2), _QUANTITIES.items(), strict=True):
        _panel(axes, table, column)
        axes.set(xlabel="Layer", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
    if table["implied"].any():
        others = ", ".join(look(str(a))[0] for a in pd.unique(table.loc[table["implied"], "attention"]))
        note = f"Implied matrix, magnitudes with rows that sum to one: {others}"
        figure.supxlabel(note, fontsize=7)
    legend(figure, table)
    return figure


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    mechanisms = list(by_mechanism(table))
    for i, (attention, rows) in enumerate(mechanisms):
        _, colour, marker = look(attention)
        aside = 0.09 * (i - (len(mechanisms) - 1) / 2)  # so that points of one layer stand side by side
        axes.plot(rows["layer"] + aside, rows[column], marker, color=(colour, 0.35), markersize=3.5,
                  markeredgecolor=colour, markeredgewidth=0.6)  # fmt: skip
        mean = rows.groupby("layer")[column].mean()
        axes.plot(mean.index + aside, mean, color=colour, linewidth=1)
