"""The study's figures: pure functions from the tables of `effvit.aggregate` to matplotlib figures, `save` apart.

A mechanism has one colour and one marker in all of them. Colours are those of Okabe and Ito, which the colour-blind
can tell apart; markers and labels repeat what colour says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec
from zlib import crc32

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import blended_transform_factory

from effvit.analysis.crossover import efficiency_length
from effvit.analysis.pareto import pareto_front
from effvit.overlay import overlay

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
_MIB = 2**20
_STOPPED = {"out of memory": "x", "over budget": "+"}
_P = ParamSpec("_P")


def look(attention: str) -> tuple[str, str, str]:
    """Label, colour and marker of a mechanism; a new one gets them by its name, the same in any company."""
    number = crc32(attention.encode())
    more = attention, _MORE_COLOURS[number % len(_MORE_COLOURS)], _MORE_MARKERS[number % len(_MORE_MARKERS)]
    return _LOOKS.get(attention, more)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whose bytes depend on the figure alone: no date, no version, no user's style."""
    crop = None if figure.get_layout_engine() else "tight"  # a figure that lays itself out has its margins already
    with matplotlib.style.context("default"):
        figure.savefig(path, format="png", dpi=200, bbox_inches=crop, metadata={"Software": None})


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorator: draw in the study's style, whatever the user's is."""

    @wraps(draw)
    def draw_styled(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return draw_styled


@styled
def training_curves(curves: pd.DataFrame) -> Figure:
    """Loss and validation accuracy by epoch of one data set; the mean over seeds, shaded from lowest to highest."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    spacing = max(1, curves["epoch"].nunique() // 6)
    for i, (attention, rows) in enumerate(by_mechanism(curves)):
        _, colour, marker = look(attention)
        for axes, column, style in (
            (loss, "val_loss", "-"),
            (loss, "train_loss", ":"),
            (accuracy, "val_accuracy", "-"),
        ):
            seeds = rows.groupby("epoch")[column].agg(["mean", "min", "max"])
            # curves that coincide stay visible by their markers, each at epochs of its own
            shown = {"marker": marker, "markevery": (i % spacing, spacing)} if style == "-" else {}
            axes.plot(seeds.index, seeds["mean"], color=colour, linestyle=style, **shown)
            axes.fill_between(seeds.index, seeds["min"], seeds["max"], color=colour, alpha=0.15, linewidth=0)
    for axes, name in ((loss, "Loss (cross-entropy)"), (accuracy, "Validation accuracy")):
        axes.set(xlabel="Epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    handles = [Line2D([], [], color="0.4", label="validation"), Line2D([], [], color="0.4", ls=":", label="training *")]
    loss.legend(handles=handles)
    note = "* as optimised, with the recipe's augmentation and label smoothing: not comparable with validation loss"
    figure.supxlabel(note, fontsize=7)
    legend(figure, curves)
    return figure


@styled
def accuracy_tradeoff(tradeoff: pd.DataFrame) -> Figure:
    """Test accuracy of one data set against MACs, latency and training memory, each with its Pareto front in grey.

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
    for axes, (column, label) in zip(panels, costs.items(), strict=True):
        axes.set(xscale="log", xlabel=label)  # costs compare as ratios
        known = table.dropna(subset=[column, "top1"])
        if known.empty:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
            continue
        front = known[pareto_front(known[column], known["top1"])].sort_values(column)
        axes.plot(front[column], front["top1"], color="0.82", linewidth=3, drawstyle="steps-post", zorder=1)
        bars = {"fmt": "none", "ecolor": "0.6", "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(known[column], known["top1"], _interval(known, "top1"), **bars)
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
    legend(figure, tradeoff, [Line2D([], [], color="0.82", linewidth=3, label="Pareto front")])
    return figure


def _interval(table: pd.DataFrame, column: str) -> list["pd.Series[float]"]:
    """Lengths of the error bars below and above a column."""
    return [table[column] - table[f"{column}_low"], table[f"{column}_high"] - table[column]]


@styled
def scaling(table: pd.DataFrame) -> Figure:
    """Time and peak memory of one attention block against sequence length, forward pass and training step.

    A mechanism stands at its ratio to `fused`, timed in turns with it in one process, times what `fused` takes; the
    band is the ratio's 95 % interval. So lines cross where the ratio is 1, whatever disturbed single processes. A
    cross at the upper edge stands at the first length at which a mechanism was stopped; a star where it becomes
    cheaper than `fused` for good, with the token count in the corner.
    """
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    names = {"time": "Time [ms]", "memory": "Peak memory [MiB]", "forward": "Forward pass", "train": "Training step"}
    for line, quantity in zip(panels, ("time", "memory"), strict=True):
        for axes, mode in zip(line, ("forward", "train"), strict=True):
            rows = table[(table["quantity"] == quantity) & (table["mode"] == mode)]
            _scaling_panel(axes, _beside_fused(rows, 1 / _MIB if quantity == "memory" else 1.0))
            axes.set(ylabel=names[quantity], title=names[mode] if quantity == "time" else "")
    for axes in panels[1]:
        axes.set_xlabel("Sequence length [tokens]")
        axes.xaxis.set(minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:,.0f}"))
        axes.set_xticks(pd.unique(table["tokens"]))
    stopped = [Line2D([], [], color="0.4", marker=m, linestyle="", label=s) for s, m in _STOPPED.items()]
    legend(figure, table, [handle for handle in stopped if handle.get_label() in set(table["status"])])
    return figure


def _beside_fused(rows: pd.DataFrame, unit: float) -> pd.DataFrame:
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
    upper_edge = blended_transform_factory(axes.transData, axes.transAxes)
    lengths = []
    for i, (attention, mine) in enumerate(by_mechanism(rows)):
        label, colour, marker = look(attention)
        done, stopped = mine[mine["status"] == "ok"], mine[mine["status"] != "ok"]
        axes.plot(done["tokens"], done["cost"], color=colour, marker=marker)
        axes.fill_between(done["tokens"], done["low"], done["high"], color=colour, alpha=0.15, linewidth=0)
        if not stopped.empty:
            first = stopped.sort_values("tokens").iloc[0]
            axes.plot(
                first["tokens"], 0.97 - 0.05 * i, _STOPPED.get(first["status"], "x"), color=colour, transform=upper_edge
            )
        if attention != "fused":
            length = _efficiency_length(mine, rows[rows["attention"] == "fused"])
            if length is not None:
                cost = np.exp(np.interp(np.log(length), np.log(done["tokens"]), np.log(done["cost"])))
                axes.plot(length, cost, "*", color=colour, markersize=10, markeredgecolor="white", zorder=3)
            lengths.append((f"{label}: {_length_text(length, done['tokens'])}", colour))
    _reference_slopes(axes, rows)
    texts = [("Cheaper than Fused from [tokens]", "black"), *lengths] if lengths else []
    for i, (text, colour) in enumerate(texts):
        axes.text(0.03, 0.97 - 0.065 * i, text, color=colour, transform=axes.transAxes, va="top", fontsize=6.5)


def _length_text(length: float | None, tokens: "pd.Series[int]") -> str:
    if length is None:
        return f"> {tokens.max():,}" if len(tokens) else "never"
    return f"{'≤ ' if length == tokens.min() else ''}{length:,.0f}"


def _efficiency_length(mine: pd.DataFrame, fused: pd.DataFrame) -> float | None:
    """Where the ratio to `fused` of one interleaved run stays below one; whichever was stopped alone is the dearer."""
    fused_done = mine["tokens"].isin(fused.loc[fused["status"] == "ok", "tokens"])
    ratio = mine["ratio_to_fused"].mask(mine["status"].ne("ok") & fused_done, np.inf)
    baseline = pd.Series(1.0, mine.index).mask(mine["status"].eq("ok") & ratio.isna(), np.inf)
    points = pd.DataFrame({"tokens": mine["tokens"], "cost": ratio.mask(np.isinf(baseline), 1.0), "baseline": baseline})
    points = points.dropna().sort_values("tokens")
    return efficiency_length(points["tokens"], points["cost"], points["baseline"]) if len(points) else None


def _reference_slopes(axes: Axes, rows: pd.DataFrame) -> None:
    """Grey lines of linear and quadratic growth through the cheapest point of the shortest sequence."""
    done = rows[rows["status"] == "ok"]
    if done.empty:
        return
    ends = np.array([done["tokens"].min(), done["tokens"].max()], dtype=float)
    start = done.loc[done["tokens"] == ends[0], "cost"].min() * 0.5
    top = done["cost"].max()
    for power, text, place in ((1, "N", (-2, -12)), (2, "N²", (-11, -1))):  # on the sides where no line ends
        end = min(ends[1], ends[0] * (top / start) ** (1 / power))  # not beyond what was measured
        x = np.array([ends[0], end])
        axes.plot(x, start * (x / ends[0]) ** power, color="0.7", linestyle="--", linewidth=0.9, zorder=1)
        corner = end, start * (end / ends[0]) ** power
        axes.annotate(text, corner, place, textcoords="offset points", color="0.5", ha="center")


@styled
def attention_maps(maps: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str]) -> Figure:
    """Attention rollout from the class token over the same images, a column a mechanism, predictions below.

    Args:
        maps: per mechanism `images` (n, H, W, 3) uint8, `labels` and `predictions` (n,), `maps` (n, gh, gw).
        classes: class names by label.
    """
    first = next(iter(maps.values()))
    count, side = len(first["images"]), min(WIDTH / (len(maps) + 1), 1.4)
    figure = Figure(figsize=((len(maps) + 1) * side, 0.5 + count * (side + 0.15)), layout="constrained")
    grid = figure.subplots(count, len(maps) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, label in zip(grid[:, 0], first["images"], first["labels"], strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(classes[label], fontsize=7, parse_math=False)
    grid[0, 0].set_title("Image")
    for column, (attention, arrays) in zip(grid.T[1:], maps.items(), strict=True):
        column[0].set_title(look(attention)[0])
        rows = zip(column, *(arrays[key] for key in ("images", "maps", "labels", "predictions")), strict=True)
        for axes, image, attended, label, predicted in rows:
            axes.imshow(overlay(image, attended), interpolation="nearest")
            verdict = {} if predicted == label else {"color": "#D55E00", "weight": "bold"}
            axes.set_xlabel(classes[predicted], fontsize=7, parse_math=False, **verdict)
    note = "Attention rollout from the class token, brightest where it is largest; wrong predictions in bold"
    figure.supxlabel(note, fontsize=7)
    return figure


@styled
def confusion(table: pd.DataFrame) -> Figure:
    """Share of each actual class by predicted class for one data set, a panel a mechanism, all seeds together."""
    classes = list(pd.unique(pd.concat([table["actual"], table["predicted"]])))
    mechanisms = list(by_mechanism(table))
    columns = min(3, len(mechanisms))
    lines = -(-len(mechanisms) // columns)
    figure = Figure(figsize=(0.9 + 2.03 * columns, 0.5 + 2.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes in grid:
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_visible(False)
    for axes, (attention, rows) in zip(grid, mechanisms, strict=False):
        pairs = rows.pivot_table("count", "actual", "predicted", aggfunc="sum", fill_value=0)
        counts = pairs.reindex(index=classes, columns=classes, fill_value=0).to_numpy(dtype=float)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.set_visible(True)
        # the power brings out the few per cent that are wrong
        picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.4, 0, 1), interpolation="nearest")
        axes.set_title(f"{look(attention)[0]}: {counts.trace() / counts.sum():.1%} correct")
        if len(classes) <= 12:
            axes.set_xticks(
                range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, parse_math=False
            )
            axes.set_yticks(range(len(classes)), classes, parse_math=False)
            for i, j in np.argwhere(share >= 0.005):
                colour = "white" if share[i, j] > 0.4 else "black"
                axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=5.5, color=colour)
    for axes in grid[len(mechanisms) - columns : len(mechanisms)]:  # the last line may be short
        axes.tick_params(labelbottom=True)
    figure.supxlabel("Predicted class", fontsize=8)
    figure.supylabel("Actual class", fontsize=8)
    bar = figure.colorbar(picture, ax=grid, aspect=40, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("Share of the actual class")
    return figure


def by_mechanism(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each mechanism of a table with its rows, in the order of the table."""
    for attention in pd.unique(table["attention"]):
        yield str(attention), table[table["attention"] == attention]


def legend(figure: Figure, table: pd.DataFrame, more: Sequence[Line2D] = ()) -> None:
    """One legend above the panels for the mechanisms of a table, and ``more`` handles after them."""
    looks = [look(str(attention)) for attention in pd.unique(table["attention"])]
    handles = [Line2D([], [], color=colour, marker=marker, label=label) for label, colour, marker in looks]
    figure.legend(handles=[*handles, *more], loc="outside upper center", ncols=7, columnspacing=1.2, handlelength=1.6)
