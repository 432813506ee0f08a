"""``effvit export``: a trained model for use without PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options
from effvit.errors import UserError


def export(
    model_dir: options.ModelDir,
    output: Annotated[Path, typer.Option(help="File to write, replaced when the model in it is verified.")],
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    dataset_dir: Annotated[
        Path | None,
        typer.Option(help="Directory that `effvit prepare` wrote: puts class names and normalisation into the file."),
    ] = None,
) -> None:
    """Write a trained model as an ONNX file with any batch size, whose output is PyTorch's within 1e-4."""
    if format != "onnx":
        raise UserError(f"--format {format}: unknown, expected onnx")

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.deploy.export import OPSET, check_output, export_onnx
    from effvit.deploy.rounding import rounded_up
    from effvit.evaluation.predict import check_fits
    from effvit.model.checkpoint import load_model

    check_output(output)
    model = load_model(model_dir)
    dataset = PreparedDataset.load(dataset_dir) if dataset_dir else None
    if dataset is not None:
        check_fits(model, dataset)
    error = export_onnx(model, output, dataset)
    typer.echo(
        f"{output}: {model.config.attention}, {output.stat().st_size:,} bytes, opset {OPSET}, any batch; "
        f"logits within {rounded_up(error)} of PyTorch's"
    )
