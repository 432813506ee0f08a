"""What all figures share: size, type, the look of a mechanism, the legend, and how a figure is written.

A mechanism has one colour and one marker in all of them. Colours are those of Okabe and Ito, and darker and lighter
ones of Tol's, which the colour-blind can tell apart; markers and labels repeat what colour says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec
from zlib import crc32

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH = 7.0  # inches: the text width of a page, so that 8 points stay 8 points
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.h_pad": 0.07,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_LOOKS = {
    "standard": ("Standard", "#56B4E9", "s"),
    "fused": ("Fused", "#000000", "o"),
    "linformer": ("Linformer", "#E69F00", "^"),
    "performer": ("Performer", "#009E73", "D"),
    "nystromformer": ("Nyströmformer", "#D55E00", "v"),
    "hybrid": ("Hybrid", "#CC79A7", "P"),
    "linear": ("Linear", "#0072B2", "X"),
    "focused": ("Focused", "#332288", "<"),
    "agent": ("Agent", "#AA3377", ">"),
    "pooled": ("Pooled", "#DDCC77", "p"),
    "window": ("Window", "#661100", "d"),
    "uniform": ("Uniform", "#BBBBBB", "h"),
}
_MORE_COLOURS, _MORE_MARKERS = ("#44AA99", "#7A7A7A", "#999933"), ("*", "H", "8")
_TINT = 0.5
_DILATED = ("#DDA3C4", "#F3DFEA", "#B0578A")  # of the hybrid's colour
CROWD = 7  # so many mechanisms have a legend; more have their names where their lines end
_P = ParamSpec("_P")


def look(attention: str) -> tuple[str, str, str]:
    """Label, colour and marker of a mechanism; a new one gets them by its name, the same in any company."""
    number = crc32(attention.encode())
    more = attention, _MORE_COLOURS[number % len(_MORE_COLOURS)], _MORE_MARKERS[number % len(_MORE_MARKERS)]
    return _LOOKS.get(attention, more)


def branch_colour(branch: str) -> str:
    """Colour of a branch of the hybrid: a tint of that of `linear`, of `window`, or for dilated windows of its own."""
    kind, _, dilation = branch.partition(" r=")
    if kind == "window" and dilation != "1":
        return _DILATED[(int(dilation) - 2) % len(_DILATED)]
    red, green, blue = (1 - _TINT * (1 - part) for part in to_rgb(look(kind)[1]))
    return to_hex((red, green, blue))  # light enough for black numbers


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, or where the suffix says so an SVG, whose bytes depend on the figure alone.

    No date, no version and no user's style are in it. Text in an SVG is text, in DejaVu Sans or what there is instead.
    """
    crop = None if figure.get_layout_engine() else "tight"  # a figure that lays itself out has its margins already
    vector = str(path).endswith(".svg")
    metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"] if vector else ["Software"])
    with matplotlib.style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "effvit"}]):
        figure.savefig(path, format="svg" if vector else "png", dpi=200, bbox_inches=crop, metadata=metadata)


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorator: draw in the study's style, whatever the user's is."""

    @wraps(draw)
    def draw_styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return draw_styled


def by_mechanism(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each mechanism of a table with its rows, in the order of the table."""
    for attention in pd.unique(table["attention"]):
        yield str(attention), table[table["attention"] == attention]


def crowded(table: pd.DataFrame) -> bool:
    """Whether a table has more mechanisms than one finds in a legend."""
    return table["attention"].nunique() > CROWD


def legend(figure: Figure, table: pd.DataFrame, more: Sequence[Line2D] = ()) -> None:
    """One legend above the panels for the mechanisms of a table, and ``more`` handles after them."""
    looks = [look(str(attention)) for attention in pd.unique(table["attention"])]
    handles = [Line2D([], [], color=colour, marker=marker, label=label) for label, colour, marker in looks]
    legend_of(figure, [*handles, *more])


def legend_of(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend above the panels, of as few rows as fit the width."""
    rows = -(-len(handles) // CROWD)
    columns = -(-len(handles) // rows) if rows else 1
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2, handlelength=1.6)


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Name lines to the right of a panel, whose limits and scales are set, at the heights where they end.

    Args:
        axes: the panel.
        ends: for each mechanism where its line ends, and what is said after its name.
    """
    if not ends:
        return
    axes.get_xlim(), axes.get_ylim()  # has them computed
    places = axes.transData.transform([(x, y) for x, y, _ in ends.values()])
    places = axes.transAxes.inverted().transform(places)
    heights = _spread(places[:, 1], 0.072)
    for (attention, (*_, more)), place, height in zip(ends.items(), places, heights, strict=True):
        label, colour, marker = look(attention)
        outside: dict[str, Any] = {"color": colour, "transform": axes.transAxes, "clip_on": False}
        axes.plot([place[0], 1.02, 1.05], [place[1], height, height], linewidth=0.5, **outside)
        axes.plot(1.05, height, marker, markersize=3.5, **outside)
        text = f"{label} {more}".rstrip()
        axes.text(1.075, height, text, color="0.15", transform=axes.transAxes, va="center", fontsize=6.5)


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Heights as near as can be, by least squares, to those given, from 0 to 1 and at least ``gap`` apart."""
    order = np.argsort(heights, kind="stable")
    groups: list[tuple[float, int]] = []  # mean and size of runs that have come together
    for i, height in enumerate(heights[order]):
        groups.append((height - gap * i, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (a, n), (b, m) = groups[-2:]
            groups[-2:] = [((a * n + b * m) / (n + m), n + m)]
    lowest = np.repeat([mean for mean, _ in groups], [size for _, size in groups])
    apart = np.clip(lowest, 0, max(0.0, 1 - gap * (len(heights) - 1))) + gap * np.arange(len(heights))
    spread = np.empty_like(heights)
    spread[order] = apart
    return spread
