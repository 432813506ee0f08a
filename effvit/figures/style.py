"""What all figures share: size, type, the look of a mechanism, the legend, and how a figure is written.

A mechanism has one colour and one marker in all of them. Colours are those of Okabe and Ito, which the colour-blind
can tell apart; markers and labels repeat what colour says.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec
from zlib import crc32

import matplotlib.style
import pandas as pd
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
}
_MORE_COLOURS, _MORE_MARKERS = ("#0072B2", "#999999", "#B8A800"), ("X", "*", "<", ">", "h")
_P = ParamSpec("_P")


def look(attention: str) -> tuple[str, str, str]:
    """Label, colour and marker of a mechanism; a new one gets them by its name, the same in any company."""
    number = crc32(attention.encode())
    more = attention, _MORE_COLOURS[number % len(_MORE_COLOURS)], _MORE_MARKERS[number % len(_MORE_MARKERS)]
    return _LOOKS.get(attention, more)


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


def legend(figure: Figure, table: pd.DataFrame, more: Sequence[Line2D] = ()) -> None:
    """One legend above the panels for the mechanisms of a table, and ``more`` handles after them."""
    looks = [look(str(attention)) for attention in pd.unique(table["attention"])]
    handles = [Line2D([], [], color=colour, marker=marker, label=label) for label, colour, marker in looks]
    handles += more
    columns = len(handles) if len(handles) <= 7 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2, handlelength=1.6)
