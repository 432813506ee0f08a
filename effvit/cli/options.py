"""Command-line options that several commands share, so that they are named and explained once."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
import yaml

from effvit.errors import UserError

_T = TypeVar("_T")

# Titles in the help.
FILES, STUDY, MODEL, ATTENTION, RECIPE = "Input and output", "Study", "Model", "Attention", "Recipe"
AUGMENTATION, MEASUREMENT, DEVICE, OUTPUT = "Augmentation", "Measurement", "Device", "Logs and checkpoints"
TITLES = (FILES, STUDY, MODEL, ATTENTION, RECIPE, AUGMENTATION, MEASUREMENT, DEVICE, OUTPUT)


def mechanism_names() -> list[str]:
    """Names of all mechanisms, found without importing PyTorch so that help and completion answer at once."""
    files = Path(__file__).parents[1].joinpath("attention").glob("*.py")
    return sorted(path.stem for path in files if path.stem not in ("__init__", "base"))


def complete_mechanism(incomplete: str) -> list[str]:
    """Names of mechanisms that begin so, the last of a comma list."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in mechanism_names() if name.startswith(last)]


def complete_dataset(incomplete: str) -> list[str]:
    """Names of data sets that begin so, the last of a comma list."""
    from effvit.data.sources import available_datasets

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in available_datasets() if name.startswith(last)]


def words(text: str) -> tuple[str, ...]:
    """``"a,b"`` to ``("a", "b")``: one value of an option that also may be repeated."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise typer.BadParameter(f"{text!r}: expected names, e.g. a or a,b")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """``"197,577"`` to ``(197, 577)``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: expected whole numbers, e.g. 197 or 197,577") from error


def joined(values: Iterable[tuple[_T, ...]] | None) -> list[_T] | None:
    """All values of a repeated option as one list; None if it was not given."""
    return list(chain.from_iterable(values)) if values else None


Attention = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_mechanism,
        rich_help_panel=ATTENTION,
        help=f"Attention mechanism: {', '.join(mechanism_names())}. See `effvit mechanisms`.",
    ),
]
AttentionOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        rich_help_panel=ATTENTION,
        help="Option of the mechanism, e.g. -o k=64; repeatable.",
    ),
]
DatasetDir = Annotated[Path, typer.Option(rich_help_panel=FILES, help="Directory written by `effvit prepare`.")]
DatasetDirIfNeeded = Annotated[
    Path | None,
    typer.Option(
        "--dataset-dir",
        rich_help_panel=FILES,
        help="Directory written by `effvit prepare`; needed if the model does not record its normalisation.",
    ),
]
ModelDir = Annotated[Path, typer.Option(rich_help_panel=FILES, help="Directory written by `effvit train`.")]
ModelDirs = Annotated[
    list[Path],
    typer.Option(
        "--model-dir", rich_help_panel=FILES, help="Directory written by `effvit train`; repeatable, one per mechanism."
    ),
]
OutputDir = Annotated[
    Path,
    typer.Option(
        rich_help_panel=FILES,
        help="Output directory. An earlier result in it is replaced once the new one is complete.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option(rich_help_panel=DEVICE, help="auto takes a GPU if there is one."),
]
Optimizer = Annotated[
    Literal["adamw", "muon"],
    typer.Option(rich_help_panel=RECIPE, help="muon updates the blocks' matrices by Muon, the rest by AdamW."),
]
CropPadding = Annotated[
    int, typer.Option(rich_help_panel=AUGMENTATION, help="Pad images by this many pixels, then crop at random.")
]
MinCropArea = Annotated[
    float, typer.Option(rich_help_panel=AUGMENTATION, help="Minimum area of a random crop (1 = centre crop).")
]
RandAugment = Annotated[
    int, typer.Option(rich_help_panel=AUGMENTATION, help="Magnitude of RandAugment, 0 to 30; 9 is usual.")
]
HorizontalFlip = Annotated[
    bool, typer.Option(rich_help_panel=AUGMENTATION, help="Mirror each image with probability 1/2.")
]
Workers = Annotated[
    int, typer.Option(rich_help_panel=DEVICE, help="Processes that decode images, if they are stored as files.")
]
ClipNorm = Annotated[float, typer.Option(rich_help_panel=RECIPE, help="Maximum norm of the gradient; 0 for no limit.")]
BatchSize = Annotated[int, typer.Option(rich_help_panel=RECIPE, help="Images per step.")]
ImagesPerPass = Annotated[
    int, typer.Option(min=1, max=2**31 - 1, rich_help_panel=DEVICE, help="Images per forward pass.")
]
Precision = Annotated[
    Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
    typer.Option(
        rich_help_panel=DEVICE,
        help="Number format; auto is bf16-mixed on GPUs that have bfloat16, else 32-true; 16-mixed needs CUDA.",
    ),
]
Compile = Annotated[
    Literal["off", "on", "graphs"],
    typer.Option(rich_help_panel=DEVICE, help="torch.compile of each block; graphs also makes CUDA graphs of them."),
]
Deterministic = Annotated[
    bool,
    typer.Option(rich_help_panel=DEVICE, help="The same bytes in every run on the same machine, or faster kernels."),
]
MeasuredPrecision = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        metavar="NAME,...",
        parser=words,
        callback=joined,
        rich_help_panel=DEVICE,
        help="float32, tf32 (CUDA) or bfloat16 (autocast); the first is that of tables and figures.",
        show_default="float32",
    ),
]
MeasuredExecution = Annotated[
    list[str] | None,
    typer.Option(
        "--execution",
        metavar="NAME,...",
        parser=words,
        callback=joined,
        rich_help_panel=DEVICE,
        help="eager, compiled or graphs (CUDA); the first is that of tables and figures.",
        show_default="eager",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(rich_help_panel=DEVICE, help="CPU threads of the measurement.", show_default="PyTorch's choice"),
]
ImageSize = Annotated[int, typer.Option(rich_help_panel=MODEL, help="Height and width of the input images in pixels.")]
Size = Literal["tiny", "small", "deit_tiny", "deit_small", "vit_base"]
Model = Annotated[
    Size,
    typer.Option(
        "--model", metavar="SIZE", rich_help_panel=MODEL, help="tiny, small, deit_tiny, deit_small or vit_base."
    ),
]
_BY_SIZE = "that of --model"
PatchSize = Annotated[
    int | None,
    typer.Option(rich_help_panel=MODEL, help="Height and width of a patch in pixels.", show_default=_BY_SIZE),
]
HiddenSize = Annotated[
    int | None, typer.Option(rich_help_panel=MODEL, help="Width of the model.", show_default=_BY_SIZE)
]
NumLayers = Annotated[
    int | None, typer.Option(rich_help_panel=MODEL, help="Number of transformer blocks.", show_default=_BY_SIZE)
]
NumHeads = Annotated[
    int | None, typer.Option(rich_help_panel=MODEL, help="Attention heads per block.", show_default=_BY_SIZE)
]
IntermediateSize = Annotated[
    int | None, typer.Option(rich_help_panel=MODEL, help="Width of a block's MLP.", show_default=_BY_SIZE)
]
PrefixTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=MODEL,
        help="Tokens before the patches: class token and registers; 0 averages the patches instead.",
        show_default="1, a class token",
    ),
]
HiddenDropout = Annotated[
    float, typer.Option(rich_help_panel=MODEL, help="Dropout of embeddings, projections and MLP.")
]
AttentionDropout = Annotated[float, typer.Option(rich_help_panel=ATTENTION, help="Dropout of attention probabilities.")]
ValueConv = Annotated[
    int,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="Kernel size of a depthwise convolution of the values in every block, odd; 0 for none.",
    ),
]
MetricsDir = Annotated[Path, typer.Option(rich_help_panel=FILES, help="Directory with cells/, analysis/ and scaling/.")]
Datasets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        metavar="NAME,...",
        parser=words,
        callback=joined,
        autocompletion=complete_dataset,
        rich_help_panel=STUDY,
        help="Data sets of the comparison.",
    ),
]
Attentions = Annotated[
    list[str],
    typer.Option(
        "--attention",
        metavar="NAME,...",
        parser=words,
        callback=joined,
        autocompletion=complete_mechanism,
        rich_help_panel=STUDY,
        help="Mechanisms of the comparison.",
    ),
]
Seeds = Annotated[
    list[int],
    typer.Option(
        "--seed",
        metavar="N,...",
        parser=whole_numbers,
        callback=joined,
        rich_help_panel=STUDY,
        help="Seeds of the comparison.",
    ),
]
Budget = Annotated[float, typer.Option(rich_help_panel=MEASUREMENT, help="Seconds of sampling.")]
BudgetOfPoint = Annotated[
    float,
    typer.Option(
        rich_help_panel=MEASUREMENT,
        help="Seconds of sampling per point. Points that need over 4 times as long are skipped.",
    ),
]
TOKENS_HELP = "Token counts 1 + n² (a class token and n x n patches), e.g. 197,577."
Tokens = typer.Option(
    metavar="N,...",
    parser=whole_numbers,
    callback=joined,
    rich_help_panel=MEASUREMENT,
    help=TOKENS_HELP,
)
ComparedAttentions = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        metavar="NAME,...",
        parser=words,
        callback=joined,
        autocompletion=complete_mechanism,
        rich_help_panel=ATTENTION,
        help="Mechanisms to compare.",
        show_default="all",
    ),
]
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
