"""Training curves."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from effvit.figures.style import WIDTH, by_mechanism, crowded, legend, look, name_ends, styled


@styled
def training_curves(curves: pd.DataFrame) -> Figure:
    """Loss and validation accuracy by epoch of one data set; the mean over seeds, shaded from lowest to highest.

    Where there are many mechanisms, their names and last accuracies stand where lines end, and nothing is shaded.
    """
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
            if not crowded(curves):
                axes.fill_between(seeds.index, seeds["min"], seeds["max"], color=colour, alpha=0.15, linewidth=0)
    for axes, name in ((loss, "Loss (cross-entropy)"), (accuracy, "Validation accuracy")):
        axes.set(xlabel="Epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    handles = [Line2D([], [], color="0.4", label="validation"), Line2D([], [], color="0.4", ls=":", label="training *")]
    loss.legend(handles=handles)
    note = "* as optimised, with the recipe's augmentation and label smoothing: not comparable with validation loss"
    figure.supxlabel(note, fontsize=7)
    if crowded(curves):
        final = curves[curves["epoch"] == curves["epoch"].max()].groupby("attention", sort=False)["val_accuracy"].mean()
        name_ends(accuracy, {str(name): (curves["epoch"].max(), mean, f"{mean:.1%}") for name, mean in final.items()})
    else:
        legend(figure, curves)
    return figure
