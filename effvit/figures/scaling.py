"""Cost against sequence length."""

from math import isqrt
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from matplotlib.transforms import blended_transform_factory

from effvit.analysis.efficiency import lengths
from effvit.figures.style import WIDTH, by_mechanism, crowded, legend, legend_of, look, name_ends, styled

_MIB = 2**20
_PATCH = 16  # pixels, of most ViTs: the cost is of tokens, whatever the patch
_STOPPED = {"out of memory": "x", "over budget": "+"}
_STOP = ["attention", "tokens", "status"]
_GROWTH: dict[str, tuple[int, Any]] = {"N": (1, ":"), "N²": (2, "--")}  # power and line


@styled
def scaling(table: pd.DataFrame, scope: str = "block") -> Figure:
    """Time and peak memory of a block or a model against sequence length, forward pass and training step, one sample.

    A mechanism stands at its ratio to `fused`, timed in turns with it in one process, times what `fused` takes; the
    band is the ratio's 95 % interval. So lines cross where the ratio is 1, whatever disturbed single processes. A
    hollow marker was measured while other programs ran. A cross above a panel stands at the first length at which a
    mechanism was stopped; a star where it becomes cheaper than `fused` for good, with the token count in the corner;
    "only" there says that it is cheaper between these measured lengths, and not at the longest. Where there are many
    mechanisms, names and token counts stand where lines end.
    """
    table = table[(table["scope"] == scope) & (table["batch"] == "one")]
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    of = "sequence" if scope == "block" else "image"
    names = {"time": f"Time [ms/{of}]", "memory": f"Peak memory [MiB/{of}]"}
    modes = {"forward": "forward pass", "train": "forward and backward" if scope == "block" else "training step"}
    what = {"block": "One attention block", "model": "Whole model"}[scope]
    stacked = []
    for line, quantity in zip(panels, ("time", "memory"), strict=True):
        for axes, mode in zip(line, ("forward", "train"), strict=True):
            rows = table[(table["quantity"] == quantity) & (table["mode"] == mode)]
            _scaling_panel(axes, _relative(rows, 1 / _MIB if quantity == "memory" else 1.0))
            stacked.append(_stop_marks(axes, rows))
            axes.set_ylabel(names[quantity])
    for axes, mode in zip(panels[0], modes.values(), strict=True):
        axes.set_title(f"{what}, {mode}", pad=6 + 8 * max(stacked))
    for axes in panels[1]:
        ticks = _apart(table["tokens"], 6 if crowded(table) else 2.5)
        axes.xaxis.set(minor_locator=NullLocator())
        if scope == "model":
            axes.set_xticks(ticks, [f"{n:,}\n{_PATCH * isqrt(n - 1):,}" for n in ticks])
            axes.set_xlabel(f"Sequence length [tokens]\nImage side [px], patches of {_PATCH} px")
        else:
            axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
            axes.set_xlabel("Sequence length [tokens]")
    more = [Line2D([], [], color="0.4", marker=m, linestyle="", label=s) for s, m in _STOPPED.items()]
    more = [handle for handle in more if handle.get_label() in set(table["status"])]
    more += [Line2D([], [], color="0.7", linestyle=line, label=f"∝ {text}") for text, (_, line) in _GROWTH.items()]
    if table["contended"].any():
        more.append(Line2D([], [], color="0.4", marker="o", markerfacecolor="white", ls="", label="other programs ran"))
    if crowded(table):
        legend_of(figure, more)
        note = "After a name: the number of tokens from which it is cheaper than Fused (star)"
        figure.supxlabel(note, fontsize=7)
    else:
        legend(figure, table, more)
    return figure


def _apart(tokens: "pd.Series[int]", factor: float) -> list[int]:
    """Token counts of which no two are less than this factor apart, the largest among them."""
    ticks: list[int] = []
    for count in sorted(set(tokens), reverse=True):
        if not ticks or ticks[-1] >= factor * count:
            ticks.append(count)
    return ticks


def _relative(rows: pd.DataFrame, unit: float) -> pd.DataFrame:
    """Add `cost`, `low` and `high`: ratios to `fused` times its own median; the own median where it has none."""
    fused = rows[(rows["attention"] == "fused") & (rows["status"] == "ok")].set_index("tokens")["median"] * unit
    baseline = rows["tokens"].map(fused).mask(rows["attention"] == "fused")
    own = (rows["median"] * unit).mask(rows["status"] != "ok")
    return rows.assign(
        cost=(rows["ratio_to_fused"] * baseline).fillna(own),
        low=rows["ratio_low"] * baseline,
        high=rows["ratio_high"] * baseline,
    )


def _scaling_panel(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set(xscale="log", yscale="log")
    found, ends = [], {}
    for attention, mine in by_mechanism(rows):
        label, colour, marker = look(attention)
        done = mine[mine["status"] == "ok"]
        axes.plot(done["tokens"], done["cost"], color=colour, marker=marker)
        contended = done[done["contended"]]
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": colour, "linestyle": ""}
        axes.plot(contended["tokens"], contended["cost"], marker=marker, **hollow)
        axes.fill_between(done["tokens"], done["low"], done["high"], color=colour, alpha=0.15, linewidth=0)
        last = done.dropna(subset="cost")[["tokens", "cost"]].tail(1)
        text = ""
        if attention != "fused":
            searched = lengths(mine, rows[rows["attention"] == "fused"])
            length = searched["length"]
            if length is not None:
                cost = np.exp(np.interp(np.log(length), np.log(done["tokens"]), np.log(done["cost"])))
                axes.plot(length, cost, "*", color=colour, markersize=10, markeredgecolor="white", zorder=3)
            text = _length_text(searched)
            found.append((f"{label}: {text}", colour))
        if len(last):
            ends[attention] = (*last.iloc[0], text)
    _reference_slopes(axes, rows)
    if crowded(rows):
        name_ends(axes, ends)
        return
    texts = [("Cheaper than Fused", "black"), ("from [tokens]", "black"), *found] if found else []
    for i, (text, colour) in enumerate(texts):
        shown = axes.text(0.03, 0.97 - 0.065 * i, text, color=colour, transform=axes.transAxes, va="top", fontsize=6.5)
        shown.set_bbox({"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0})  # text stays text in an SVG


def _stop_marks(axes: Axes, rows: pd.DataFrame) -> int:
    """Above the panel, where no mark can be taken for a cost: each mechanism's first length that was too much.

    Returns how many stand upon each other.
    """
    stopped = rows[rows["status"] != "ok"].sort_values("tokens", kind="stable").drop_duplicates("attention")
    above = blended_transform_factory(axes.transData, axes.transAxes)
    heights = stopped.groupby("tokens").cumcount()
    for attention, tokens, status, i in zip(*(stopped[c] for c in _STOP), heights, strict=True):
        mark: dict[str, Any] = {"color": look(attention)[1], "transform": above, "clip_on": False}
        axes.plot(tokens, 1.04 + 0.05 * i, _STOPPED.get(status, "x"), **mark)
    return int(heights.max()) + 1 if len(stopped) else 0


def _length_text(searched: dict[str, float | None]) -> str:
    length, first, last = (searched[key] for key in ("length", "measured_from", "measured_to"))
    if searched["cheaper_to"] is not None:
        ends = dict.fromkeys(f"{searched[end]:,.0f}" for end in ("cheaper_from", "cheaper_to"))
        return f"{' to '.join(ends)} only"
    if length is None:
        return "never" if last is None else f"> {last:,.0f}"
    return f"{'≤ ' if length == first else ''}{length:,.0f}"


def _reference_slopes(axes: Axes, rows: pd.DataFrame) -> None:
    """Grey lines of linear and quadratic growth through the cheapest point of the shortest sequence."""
    done = rows[rows["status"] == "ok"]
    if done.empty:
        return
    ends = np.array([done["tokens"].min(), done["tokens"].max()], dtype=float)
    start = done.loc[done["tokens"] == ends[0], "cost"].min() * 0.5
    top = done["cost"].max()
    for power, line in _GROWTH.values():
        end = min(ends[1], ends[0] * (top / start) ** (1 / power))  # not beyond what was measured
        x = np.array([ends[0], end])
        axes.plot(x, start * (x / ends[0]) ** power, color="0.7", linestyle=line, linewidth=0.9, zorder=1)
