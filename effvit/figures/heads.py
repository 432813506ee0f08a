"""How far and how broadly heads look."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from effvit.figures.style import CROWD, WIDTH, by_mechanism, legend, look, styled

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
        note = f"Implied matrix, magnitudes with rows that sum to one: {_implied(table)}"
        figure.supxlabel(note, fontsize=7)
    legend(figure, table)
    return figure


def _implied(table: pd.DataFrame) -> str:
    """Names of the mechanisms whose matrix is implied, or of those whose matrix is not, where these are fewer."""
    exact, implied = (
        [look(str(a))[0] for a in pd.unique(table.loc[table["implied"] == is_implied, "attention"])]
        for is_implied in (False, True)
    )
    return ", ".join(implied) if len(implied) <= CROWD else "all but " + " and ".join(exact) if exact else "all"


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    mechanisms = list(by_mechanism(table))
    for i, (attention, rows) in enumerate(mechanisms):
        _, colour, marker = look(attention)
        step = min(0.09, 0.7 / len(mechanisms))
        aside = step * (i - (len(mechanisms) - 1) / 2)  # so that points of one layer stand side by side
        axes.plot(rows["layer"] + aside, rows[column], marker, color=(colour, 0.35), markersize=3.5,
                  markeredgecolor=colour, markeredgewidth=0.6)  # fmt: skip
        mean = rows.groupby("layer")[column].mean()
        axes.plot(mean.index + aside, mean, color=colour, linewidth=1)
