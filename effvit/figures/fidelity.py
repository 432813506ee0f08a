"""Error to exact attention against what it costs."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from effvit.figures.style import WIDTH, by_mechanism, legend, look, styled

_EXACT = 1e-4  # rounding alone
_TITLES = {"random": "Random q, k, v", "trained": "Trained q, k, v"}
_VARIANT = ["attention", "option", "value"]


@styled
def fidelity(errors: pd.DataFrame, replaced: pd.DataFrame) -> Figure:
    """Relative error of one data set on random and on trained q, k, v, and accuracy with attention replaced.

    All against the multiply-adds of mixing; the dotted line is what exact attention takes. A line joins the sizes of a
    mechanism; trained errors are means over layers, bars 95 % intervals over draws of features. Marks on the lower axis
    stand for exact results, which have no logarithm.
    """
    drawn = pd.unique(errors.loc[errors["error"] > _EXACT, "attention"])  # exact attention is the dotted line
    why_empty = "exact attention alone" if "trained" in set(errors["source"]) else "no trained Fused model"
    exact_macs = errors["fused_macs"].iloc[0]
    errors, replaced = (table[table["attention"].isin(drawn)] for table in (errors, replaced))
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, 3)
    floor = 0.6 * errors.loc[errors["error"] > _EXACT, "error"].min()
    for axes, (source, title) in zip(panels, _TITLES.items(), strict=False):
        _error_panel(axes, errors[errors["source"] == source], 0.1 if pd.isna(floor) else floor)
        axes.set_title(title)
    costs = errors.drop_duplicates(_VARIANT)[[*_VARIANT, "mixing_macs", "fused_macs"]]
    _accuracy_panel(panels[2], replaced.merge(costs, on=_VARIANT, how="left"))
    panels[0].set_ylabel("Relative error of the output")
    for axes in panels:
        if not axes.lines:
            axes.text(0.5, 0.5, why_empty, transform=axes.transAxes, ha="center", color="0.4")
        axes.set(xscale="log", xlabel="Mixing [MMACs per block]")
        axes.xaxis.set(major_formatter=StrMethodFormatter("{x:g}"), minor_formatter=NullFormatter())
        axes.axvline(exact_macs / 1e6, color="0.3", linestyle=":", linewidth=1, zorder=1)
    figure.supxlabel("Marks on the axis are exact up to rounding; E, F, gates and features are untrained", fontsize=7)
    exact = Line2D([], [], color="0.3", linestyle=":", linewidth=1, label="cost of exact")
    legend(figure, errors, [exact])
    return figure


def _error_panel(axes: Axes, rows: pd.DataFrame, floor: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"),
        minor_formatter=NullFormatter(),
    )  # fmt: skip
    for attention, of_all in by_mechanism(rows):
        _, colour, marker = look(attention)
        mean = of_all.groupby("value", dropna=False)[["mixing_macs", "error", "error_low", "error_high"]].mean()
        near = mean[mean["error"] > _EXACT].sort_values("mixing_macs")
        bars = [near["error"] - near["error_low"], near["error_high"] - near["error"]]
        axes.errorbar(
            near["mixing_macs"] / 1e6, near["error"], bars, color=colour, marker=marker, elinewidth=0.8, capsize=1.5
        )
        exact = mean.loc[mean["error"] <= _EXACT, "mixing_macs"] / 1e6
        (marks,) = axes.plot(exact, [floor] * len(exact), marker, color=colour, clip_on=False, zorder=3)
        marks.set_in_layout(False)  # they are by the axis, and would be measured before axes are logarithmic
    axes.set_ylim(bottom=floor)


def _accuracy_panel(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set_title("Replaced, not retrained")
    axes.set_ylabel("Validation accuracy")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    if rows.empty:
        return
    axes.axhline(rows["top1_fused"].iloc[0], color="black", linewidth=0.9, zorder=1)
    for attention, mine in by_mechanism(rows):
        _, colour, marker = look(attention)
        mine = mine.sort_values("mixing_macs")
        axes.plot(mine["mixing_macs"] / 1e6, mine["top1"], color=colour, marker=marker)
    low = rows["top1_fused"].iloc[0] - 0.02
    axes.text(0.99, low, "Fused, as trained", transform=axes.get_yaxis_transform(), fontsize=7, ha="right", va="top")
    axes.set_ylim(0, 1.03)
