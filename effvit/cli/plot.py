"""``effvit plot``: the figures of a comparison."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effvit.cli import options
from effvit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

_PIXELS = "-attention-maps"  # photographs, which lines do not make sharper
_KEY = {"dataset": str, "attention": str}
_CASE = dict.fromkeys(("attention", "scope", "batch", "mode", "quantity"), str)
_MAY_BE_EMPTY = "replaced"  # without `fused`
_COLUMNS: dict[str, dict[str, Any]] = {
    "curves": _KEY | {"epoch": int} | dict.fromkeys(("train_loss", "val_loss", "val_accuracy"), float),
    "tradeoff": _KEY
    | {"batch_size": "Int64"}
    | dict.fromkeys(("top1", "top1_low", "top1_high", "gmacs", "train_memory_mib"), float)
    | dict.fromkeys(("top1_images_low", "top1_images_high"), float)
    | dict.fromkeys(("latency_ratio", "latency_ratio_low", "latency_ratio_high"), float),
    "hardware": _KEY
    | {"split": str, "n_images": int, "onnx_status": str, "int8_status": str}
    | dict.fromkeys(("fused_latency_ms", "top1", "int8_top1"), float)
    | {f"{r}ratio_{end}": float for r in ("", "onnx_", "int8_") for end in ("to_fused", "low", "high")},
    "fidelity": _KEY
    | {"source": str, "option": str, "value": "Int64", "mixing_macs": int, "fused_macs": int}
    | dict.fromkeys(("error", "error_low", "error_high"), float),
    "replaced": _KEY | {"option": str, "value": "Int64", "top1": float, "top1_fused": float},
    "cka": {"dataset": str, "attention_a": str, "layer_a": int, "attention_b": str, "layer_b": int}
    | {"cka": float, "n_images": int},
    "scaling": _CASE
    | {"batch_size": int, "tokens": int, "status": str, "contended": bool}
    | dict.fromkeys(("median", "ratio_to_fused", "ratio_low", "ratio_high"), float),
}


def plot(
    data_dir: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="Directory of the tables written by `effvit aggregate`.")
    ],
    metrics_dir: options.MetricsDir,
    prepared_dir: Annotated[
        Path, typer.Option(rich_help_panel=options.FILES, help="Directory with one prepared data set per name.")
    ],
    output_dir: options.OutputDir,
    vector_dir: Annotated[
        Path,
        typer.Option(rich_help_panel=options.FILES, help="Directory to write the charts to as SVG; it is replaced."),
    ],
    datasets: options.Datasets,
    attentions: options.Attentions,
    seed: Annotated[int, typer.Option(rich_help_panel=options.STUDY, help="Seed whose attention maps are drawn.")] = 0,
) -> None:
    """Draw the figures of a comparison.

    All are PNG files in OUTPUT_DIR. Charts are also SVG files in VECTOR_DIR.
    """
    from effvit import figures
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.files import check_apart, staged_dir

    check_apart(output_dir, data_dir, metrics_dir, prepared_dir, vector_dir)
    check_apart(vector_dir, data_dir, metrics_dir, prepared_dir, output_dir)
    prepared = {d: PreparedDataset.load(prepared_dir / d) for d in datasets}
    maps = {d: _maps(metrics_dir / "cells" / d, attentions, seed, len(prepared[d].classes)) for d in datasets}
    rows = {(t, d): _select(data_dir, t, attentions, d) for t in _COLUMNS if t != "scaling" for d in datasets}
    scaling = _select(data_dir, "scaling", attentions)
    studied = {"scaling": figures.scaling(scaling), "scaling_model": figures.scaling(scaling, "model")}
    with (
        staged_dir(vector_dir, ("scaling.svg", "*.svg")) as vectors,
        staged_dir(output_dir, ("scaling.png", "*.png")) as aside,
    ):

        def save(figure: "Figure", name: str) -> None:
            figures.save(figure, aside / f"{name}.png")
            if not name.endswith(_PIXELS):
                figures.save(figure, vectors / f"{name}.svg")

        for name, figure in studied.items():
            save(figure, name)
        for dataset in datasets:
            pictures = {
                "curves": figures.training_curves(rows["curves", dataset]),
                "tradeoff": figures.accuracy_tradeoff(rows["tradeoff", dataset]),
                "hardware": figures.hardware(rows["hardware", dataset]),
                "fidelity": figures.fidelity(rows["fidelity", dataset], rows["replaced", dataset]),
                "cka": figures.cka(rows["cka", dataset]),
                "attention-maps": figures.attention_maps(maps[dataset], prepared[dataset].classes),
            }
            for name, figure in pictures.items():
                save(figure, f"{dataset}-{name}")
        count = len(list(aside.iterdir()))
    typer.echo(f"{count} figures in {output_dir}")


def _select(data_dir: Path, table: str, attentions: list[str], dataset: str | None = None) -> "pd.DataFrame":
    """Rows of the named data set and mechanisms, in the table's order.

    It must have some of each mechanism, unless it is a table that may have no rows at all.
    """
    from effvit.study.cells import read_csv

    path = data_dir / f"{table}.csv"
    rows = read_csv(path, "aggregate", _COLUMNS[table], may_be_empty=table == _MAY_BE_EMPTY)
    names = [column for column in _COLUMNS[table] if column.startswith("attention")]
    rows = rows[rows[names].isin(attentions).all(axis=1)]
    if dataset is not None:
        rows = rows[rows["dataset"] == dataset]
    absent = [attention for attention in attentions if attention not in set(rows[names[0]])]
    if absent and table != _MAY_BE_EMPTY:
        of = f" of {dataset}" if dataset else ""
        raise UserError(f"{path}: nothing{of} with {', '.join(absent)}; `dvc repro aggregate` makes it")
    return rows


def _maps(cells_dir: Path, attentions: list[str], seed: int, classes: int) -> dict[str, dict[str, "np.ndarray"]]:
    import numpy as np

    from effvit.study.cells import attention_maps

    maps = {}
    for attention in attentions:
        directory = cells_dir / attention / f"seed{seed}" / "evaluate"
        maps[attention] = arrays = attention_maps(directory)
        if not np.array_equal(arrays["images"], maps[attentions[0]]["images"]):
            raise UserError(f"{directory}: maps of other images than {attentions[0]}'s; `dvc repro -f evaluate`")
        if not all(((arrays[key] >= 0) & (arrays[key] < classes)).all() for key in ("labels", "predictions")):
            raise UserError(f"{directory}: maps of other classes than the data set's; `dvc repro -f evaluate`")
    return maps
