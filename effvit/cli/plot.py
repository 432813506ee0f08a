"""``effvit plot``: the figures of a comparison."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effvit.cli.options import Attentions, Datasets, MetricsDir, OutputDir, check_apart
from effvit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

_PER_CLASS = 8  # images of a class on the sample sheet
_PIXELS = ("-attention-maps", "-samples")  # photographs, which lines do not make sharper
_KEY = {"dataset": str, "attention": str}
_COLUMNS: dict[str, dict[str, Any]] = {
    "curves": _KEY | {"epoch": int} | dict.fromkeys(("train_loss", "val_loss", "val_accuracy"), float),
    "tradeoff": _KEY
    | {"batch_size": "Int64"}
    | dict.fromkeys(("top1", "top1_low", "top1_high", "gmacs", "train_memory_mib"), float)
    | dict.fromkeys(("latency_ratio", "latency_ratio_low", "latency_ratio_high"), float),
    "confusion": _KEY | {"actual": str, "predicted": str, "count": int},
    "scaling": {"attention": str, "tokens": int, "mode": str, "quantity": str, "status": str}
    | dict.fromkeys(("median", "ratio_to_fused", "ratio_low", "ratio_high"), float),
}


def plot(
    data_dir: Annotated[Path, typer.Option(help="Directory of the tables that `effvit aggregate` wrote.")],
    metrics_dir: MetricsDir,
    prepared_dir: Annotated[Path, typer.Option(help="Directory that holds a prepared data set of each name.")],
    output_dir: OutputDir,
    vector_dir: Annotated[Path, typer.Option(help="Directory to write the charts to as SVG; replaced as a whole.")],
    datasets: Datasets,
    attentions: Attentions,
    seed: Annotated[int, typer.Option(help="The seed whose attention maps are drawn.")] = 0,
) -> None:
    """Draw training curves, trade-offs, scaling, attention maps, confusion and sample images.

    All are PNG files in OUTPUT_DIR; those that are not made of pixels are SVG files in VECTOR_DIR as well.
    """
    from effvit import figures
    from effvit.data.prepared import PreparedDataset
    from effvit.data.samples import sample_sheet
    from effvit.files import staged_dir

    check_apart(output_dir, data_dir, metrics_dir, prepared_dir, vector_dir)
    check_apart(vector_dir, data_dir, metrics_dir, prepared_dir, output_dir)
    prepared = {d: PreparedDataset.load(prepared_dir / d) for d in datasets}
    maps = {d: _maps(metrics_dir / "cells" / d, attentions, seed, len(prepared[d].classes)) for d in datasets}
    rows = {(t, d): _select(data_dir, t, attentions, d) for t in ("curves", "tradeoff", "confusion") for d in datasets}
    scaling = _select(data_dir, "scaling", attentions)
    with staged_dir(vector_dir, "scaling.svg") as vectors, staged_dir(output_dir, "scaling.png") as aside:

        def save(figure: "Figure", name: str) -> None:
            figures.save(figure, aside / f"{name}.png")
            if not name.endswith(_PIXELS):
                figures.save(figure, vectors / f"{name}.svg")

        save(figures.scaling(scaling), "scaling")
        for dataset in datasets:
            pictures = {
                "curves": figures.training_curves(rows["curves", dataset]),
                "tradeoff": figures.accuracy_tradeoff(rows["tradeoff", dataset]),
                "confusion": figures.confusion(rows["confusion", dataset]),
                "attention-maps": figures.attention_maps(maps[dataset], prepared[dataset].classes),
                "samples": sample_sheet(prepared[dataset], _PER_CLASS),
            }
            for name, figure in pictures.items():
                save(figure, f"{dataset}-{name}")
    typer.echo(f"{1 + len(datasets) * len(pictures)} figures in {output_dir}")


def _select(data_dir: Path, table: str, attentions: list[str], dataset: str | None = None) -> "pd.DataFrame":
    """Rows of the named data set and mechanisms, in the table's order; it must have some of each mechanism."""
    from effvit.cells import read_csv

    path = data_dir / f"{table}.csv"
    rows = read_csv(path, "aggregate", _COLUMNS[table])
    rows = rows[rows["attention"].isin(attentions)]
    if dataset is not None:
        rows = rows[rows["dataset"] == dataset]
    if absent := [attention for attention in attentions if attention not in set(rows["attention"])]:
        of = f" of {dataset}" if dataset else ""
        raise UserError(f"{path}: nothing{of} with {', '.join(absent)}; `dvc repro aggregate` makes it")
    return rows


def _maps(cells_dir: Path, attentions: list[str], seed: int, classes: int) -> dict[str, dict[str, "np.ndarray"]]:
    import numpy as np

    from effvit.cells import attention_maps

    maps = {}
    for attention in attentions:
        directory = cells_dir / attention / f"seed{seed}" / "evaluate"
        maps[attention] = arrays = attention_maps(directory)
        if not np.array_equal(arrays["images"], maps[attentions[0]]["images"]):
            raise UserError(f"{directory}: maps of other images than {attentions[0]}'s; `dvc repro -f evaluate`")
        if not all(((arrays[key] >= 0) & (arrays[key] < classes)).all() for key in ("labels", "predictions")):
            raise UserError(f"{directory}: maps of other classes than the data set's; `dvc repro -f evaluate`")
    return maps
