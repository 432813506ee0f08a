"""What runs where on constrained hardware, and what it costs."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from effvit.figures.style import WIDTH, look, styled

_RUNTIMES = {"": ("PyTorch, eager", "o"), "onnx_": ("onnxruntime", "D"), "int8_": ("onnxruntime, int8 weights", "^")}


@styled
def hardware(table: pd.DataFrame) -> Figure:
    """One data set's mechanisms on one thread, one image at a time: latency, and accuracy lost to int8.

    A latency stands at its ratio to eager `fused`, timed in turns with it in one process, times what `fused` took; its
    bar is the ratio's 95 % interval. Text says where a mechanism does not run.
    """
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(table)), layout="constrained")
    latency, accuracy = figure.subplots(1, 2, sharey=True)
    labels, colours, _ = zip(*(look(str(attention)) for attention in table["attention"]), strict=True)
    fused = table["fused_latency_ms"].median()
    for axes in (latency, accuracy):
        axes.set(yticks=range(len(table)), yticklabels=labels, ylim=(len(table) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
    for i, (prefix, (_, marker)) in enumerate(_RUNTIMES.items()):
        y = np.arange(len(table)) + 0.24 * (i - 1)
        ratio, low, high = (table[f"{prefix}ratio_{end}"] * fused for end in ("to_fused", "low", "high"))
        latency.errorbar(
            ratio, y, xerr=[ratio - low, high - ratio], fmt="none", ecolor="0.6", elinewidth=0.9, capsize=2
        )
        _points(latency, ratio, y, colours, marker)
    change = table["int8_top1"] - table["top1"]
    accuracy.axvline(0, color="0.6", linewidth=0.9)
    _points(accuracy, change, np.arange(len(table)), colours, _RUNTIMES["int8_"][1])
    across = accuracy.get_yaxis_transform()
    for at, (onnx, int8) in enumerate(zip(table["onnx_status"], table["int8_status"], strict=True)):
        if int8 != "ok":  # as where onnxruntime does not run it at all
            absent = _RUNTIMES["int8_" if onnx == "ok" else "onnx_"][0]
            said = f"{absent}: not supported"
            accuracy.text(0.5, at, said, color="0.4", va="center", ha="center", transform=across)
    accuracy.margins(x=0.15)
    accuracy.xaxis.set(major_locator=MaxNLocator(5), major_formatter=StrMethodFormatter("{x:+.1%}"))
    n, split = table["n_images"].iloc[0], table["split"].iloc[0]
    accuracy.set_xlabel(f"Top-1 change by int8 [n = {n:,} {split} images]")
    latency.set(xscale="log", xlabel="Latency [ms/image]")
    latency.margins(x=0.1)
    latency.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    latency.xaxis.set(minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:,g}"))
    handles = [Line2D([], [], color="0.3", marker=m, linestyle="", label=name) for name, m in _RUNTIMES.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _points(axes: Axes, x: "pd.Series[float]", y: np.ndarray, colours: tuple[str, ...], marker: str) -> None:
    for value, at, colour in zip(x.astype(float), y, colours, strict=True):
        axes.plot(value, at, marker, color=(colour, 0.35), markersize=6, markeredgecolor=colour)
