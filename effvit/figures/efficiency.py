"""From which sequence length a mechanism is cheaper than `fused`, as measured and as its MACs predict."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from effvit.figures.style import WIDTH, look, styled

_CASES = {"time": "s", "memory": "D"}  # markers
_HEIGHT = 0.16  # of a quantity's line within a mechanism's place


@styled
def efficiency_lengths(table: pd.DataFrame) -> Figure:
    """Efficiency length of each mechanism with its interval: in time and in memory, a row a scope, a column a mode.

    An arrow to the right stands for "not cheaper up to there", one to the left for "cheaper from the shortest measured
    on"; a dotted line is where it is cheaper in between only; a grey bar is the length at which MACs fall below those
    of `fused`. A hollow marker was measured while other programs ran. Batches of one sample.
    """
    table = table[(table["batch"] == "one") & (table["attention"] != "fused")]
    mechanisms = [str(name) for name in pd.unique(table["attention"])]
    scopes = {"block": "One attention block", "model": "Whole model"}
    modes = {"forward": "forward pass", "train": "training step"}
    figure = Figure(figsize=(WIDTH, 0.9 + 2 * (0.5 + 0.3 * max(1, len(mechanisms)))), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, (scope, what) in zip(panels, scopes.items(), strict=True):
        for axes, (mode, of) in zip(line, modes.items(), strict=True):
            _panel(axes, table[(table["scope"] == scope) & (table["mode"] == mode)], mechanisms)
            axes.set_title(f"{what}, {'forward and backward' if (scope, mode) == ('block', 'train') else of}")
    for axes in panels[1]:
        axes.set_xlabel("Cheaper than Fused from [tokens]")
    if table.empty:
        panels[0, 0].text(0.5, 0.5, "Fused alone", transform=panels[0, 0].transAxes, ha="center", color="0.4")
    handles = [Line2D([], [], color="0.3", marker=marker, label=case) for case, marker in _CASES.items()]
    handles.append(Line2D([], [], color="0.6", marker="|", ls="", markersize=11, mew=2, label="predicted from MACs"))
    handles.append(Line2D([], [], color="0.3", marker=">", ls="", label="not up to there"))
    if table["cheaper_to"].notna().any():
        handles.append(Line2D([], [], color="0.3", marker=".", ls=":", label="in between only"))
    if table["contended"].any():
        handles.append(Line2D([], [], color="0.3", marker="s", mfc="white", ls="", label="other programs ran"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.6)
    return figure


def _panel(axes: Axes, table: pd.DataFrame, mechanisms: Sequence[str]) -> None:
    axes.set(xscale="log", ylim=(len(mechanisms) - 0.45, -0.55))
    axes.set_yticks(range(len(mechanisms)), [look(name)[0] for name in mechanisms])
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 3)), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(x=0.14)
    for row in table.to_dict("records"):
        place = mechanisms.index(str(row["attention"]))
        _, colour, _ = look(str(row["attention"]))
        offset = -_HEIGHT if row["quantity"] == "time" else _HEIGHT
        _length(axes, row, place + offset, colour)
        if pd.notna(row["predicted_length"]):
            axes.plot(row["predicted_length"], place, "|", color="0.6", markersize=15, markeredgewidth=2, zorder=1)


def _length(axes: Axes, row: dict[Any, Any], y: float, colour: str) -> None:
    """One mechanism's mark: point and interval, or an arrow to where it has been looked for."""
    first, last = row["measured_from"], row["measured_to"]
    if pd.isna(last):
        axes.text(0.5, y, "not measured", transform=axes.get_yaxis_transform(), color=colour, va="center", fontsize=6)
        return
    length, low, high = (row[key] for key in ("length", "length_low", "length_high"))
    fill: dict[str, Any] = {"color": colour, "markerfacecolor": "white" if row["contended"] else colour}
    note: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 6, "color": colour}
    if pd.notna(low):
        axes.plot([low, last if pd.isna(high) else high], [y, y], color=colour, solid_capstyle="butt")
    if pd.notna(row["cheaper_to"]):
        between = row["cheaper_from"], row["cheaper_to"]
        axes.plot(between, [y, y], marker=".", linestyle=":", **fill)
        text = f"{between[0]:,.0f} to {between[1]:,.0f} only"
        axes.annotate(text, (np.sqrt(between[0] * between[1]), y), (0, -6), ha="center", **note)
    elif pd.isna(length):
        axes.plot(last, y, marker=">", **fill)
        axes.annotate(f"> {last:,.0f}", (last, y), (-6, 0), ha="right", **note)
    elif np.isclose(length, first):
        axes.plot(length, y, marker="<", **fill)
        axes.annotate(f"≤ {length:,.0f}", (length, y), (-6, 0), ha="right", **note)
    else:
        axes.plot(length, y, marker=_CASES[str(row["quantity"])], **fill)
        if pd.isna(high):
            axes.plot(last, y, marker=">", markersize=3, color=colour)
