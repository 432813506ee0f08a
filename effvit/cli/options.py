"""Command-line options that several commands share, so that they are named and explained once."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from effvit.errors import UserError

Attention = Annotated[str, typer.Option(help="Attention mechanism; `effvit mechanisms` lists them.")]
AttentionOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the mechanism, e.g. -o k=64; repeatable."),
]
DatasetDir = Annotated[Path, typer.Option(help="Directory that `effvit prepare` wrote.")]
DatasetDirIfNeeded = Annotated[
    Path | None,
    typer.Option(
        "--dataset-dir", help="Directory that `effvit prepare` wrote, for a model that knows no normalisation."
    ),
]
ModelDir = Annotated[Path, typer.Option(help="Directory that `effvit train` wrote.")]
OutputDir = Annotated[Path, typer.Option(help="Directory to write; replaced as a whole when all of it is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Optimizer = Annotated[str, typer.Option(help="adamw, or muon for the matrices of the blocks.")]
CropPadding = Annotated[int, typer.Option(help="Random crops from images padded by this many pixels.")]
MinCropArea = Annotated[
    float, typer.Option(help="Least share of a large stored image that a random crop keeps; 1 for the centre.")
]
RandAugment = Annotated[int, typer.Option(help="Magnitude of RandAugment, to 30; 9 is usual.")]
Workers = Annotated[int, typer.Option(help="Processes that decode images, where they are stored as files.")]
HorizontalFlip = Annotated[bool, typer.Option(help="Mirror half of the images.")]
ClipNorm = Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no limit.")]
BatchSize = Annotated[int, typer.Option(help="Images a step.")]
Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed or, on CUDA, 16-mixed.")]
Compile = Annotated[bool, typer.Option(help="Compile the model with torch.compile.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of the measurement; PyTorch's default if not given.")]
ImageSize = Annotated[int, typer.Option(help="Height and width of the input in pixels.")]
Model = Annotated[
    str, typer.Option("--model", help="Size: tiny, small, deit_tiny, deit_small or vit_base; flags below change it.")
]
PatchSize = Annotated[int | None, typer.Option(help="Height and width of a patch in pixels.")]
HiddenSize = Annotated[int | None, typer.Option(help="Width of the model.")]
NumLayers = Annotated[int | None, typer.Option(help="Number of transformer blocks.")]
NumHeads = Annotated[int | None, typer.Option(help="Attention heads of a block.")]
IntermediateSize = Annotated[int | None, typer.Option(help="Width of a block's MLP.")]
PrefixTokens = Annotated[
    int | None, typer.Option(help="Tokens before the patches: class token and registers; 0 averages the patches.")
]
HiddenDropout = Annotated[float, typer.Option(help="Dropout of embeddings, projections, MLP.")]
AttentionDropout = Annotated[float, typer.Option(help="Dropout of attention.")]
ValueConv = Annotated[
    int, typer.Option(help="Side of a depthwise convolution of the values in every block, odd; 0 for none.")
]
MetricsDir = Annotated[Path, typer.Option(help="Directory that holds cells/, analysis/ and scaling/.")]
Datasets = Annotated[list[str], typer.Option("--dataset", help="Data set of the comparison; repeatable.")]
Attentions = Annotated[list[str], typer.Option("--attention", help="Mechanism of the comparison; repeatable.")]
Images = Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")]


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """``["k=64", "share=kv"]`` to ``{"k": 64, "share": "kv"}``; values are read as YAML."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UserError(f"--option {pair}: expected KEY=VALUE, for example k=64")
        if key in options:
            raise UserError(f"--option {pair}: {key} is given twice, expected once")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--option {pair}: {value!r} is not a YAML value") from error
    return options
