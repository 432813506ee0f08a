"""``effvit export``: a trained model for use without effvit."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from effvit.cli import options


def export(
    model_dir: options.ModelDir,
    output: Annotated[Path, typer.Option(rich_help_panel=options.FILES, help="File to write, .onnx or .safetensors.")],
    format: Annotated[
        Literal["onnx", "timm", "transformers"],
        typer.Option(
            rich_help_panel=options.FILES,
            help="onnx, or a state dict with the names of timm or transformers.",
        ),
    ] = "onnx",
    dataset_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES,
            help="Directory written by `effvit prepare`; its class names and normalisation go into the file if the "
            "model does not record them.",
        ),
    ] = None,
) -> None:
    """Write a trained model as ONNX, or as a state dict for the ViT of timm or transformers.

    An ONNX file takes any batch size and reproduces PyTorch's logits within 1e-4. A state dict needs a model with
    `fused` or `standard` attention, because that is what the other library's model computes.
    """
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.deploy.export import OPSET, check_output, export_onnx
    from effvit.deploy.rounding import rounded_up
    from effvit.deploy.state_dict import export_state_dict
    from effvit.evaluation.predict import check_fits
    from effvit.model.checkpoint import load_model
    from effvit.model.trained_on import TrainedOn

    check_output(output, ".onnx" if format == "onnx" else ".safetensors")
    model = load_model(model_dir)
    dataset = check_fits(model, PreparedDataset.load(dataset_dir)) if dataset_dir else None
    if dataset is not None:
        model.trained_on = TrainedOn(classes=dataset.classes, mean=dataset.mean, std=dataset.std)
    if format == "onnx":
        error = export_onnx(model, output, dataset)
        said = f"opset {OPSET}, any batch; logits within {rounded_up(error)} of PyTorch's"
    else:
        said = f"for {export_state_dict(model, output, format)}"
    typer.echo(f"{output}: {model.config.attention}, {output.stat().st_size:,} bytes, {said}")
