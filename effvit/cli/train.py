"""``effvit train``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from effvit.cli import options

if TYPE_CHECKING:
    from effvit.model.vit import ViTConfig
    from effvit.training.run import Summary

_MANY_TOKENS, _TOKENS_OF_224 = 1100, 197


def train(
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    attention: options.Attention = "fused",
    option: options.AttentionOptions = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, rich_help_panel=options.RECIPE, help="Seed of weights, data order and augmentation."
        ),
    ] = 0,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES,
            help="Directory for history.csv, timing.csv and provenance.json.",
            show_default="<output-dir>-log",
        ),
    ] = None,
    model: Annotated[
        options.Size | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=options.MODEL,
            help="tiny, small, deit_tiny, deit_small or vit_base.",
            show_default="tiny",
        ),
    ] = None,
    timm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=options.MODEL,
            help="Instead of --model: the size of a ViT in timm, e.g. vit_small_patch16_224.",
        ),
    ] = None,
    patch_size: options.PatchSize = None,
    hidden_size: options.HiddenSize = None,
    num_hidden_layers: options.NumLayers = None,
    num_attention_heads: options.NumHeads = None,
    intermediate_size: options.IntermediateSize = None,
    prefix_tokens: options.PrefixTokens = None,
    initializer_range: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=options.MODEL,
            help="Standard deviation of the initial weights (truncated normal).",
            show_default="that of --model",
        ),
    ] = None,
    hidden_dropout_prob: options.HiddenDropout = 0.0,
    attention_probs_dropout_prob: options.AttentionDropout = 0.0,
    value_conv: options.ValueConv = 0,
    init_from: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.FILES,
            help="Weights to start from: a model directory, or a ViT of timm, transformers or torchvision.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(rich_help_panel=options.RECIPE, help="Passes over the training images.")] = 10,
    batch_size: options.BatchSize = 128,
    optimizer: options.Optimizer = "adamw",
    lr: Annotated[float, typer.Option(rich_help_panel=options.RECIPE, help="Peak learning rate.")] = 1e-3,
    weight_decay: Annotated[
        float, typer.Option(rich_help_panel=options.RECIPE, help="Weight decay of matrices.")
    ] = 0.05,
    warmup_epochs: Annotated[
        float,
        typer.Option(rich_help_panel=options.RECIPE, help="Epochs of linear warm-up, before the cosine decay."),
    ] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(rich_help_panel=options.RECIPE, help="Share of the target spread over all classes.")
    ] = 0.0,
    clip_norm: options.ClipNorm = 0.0,
    crop_padding: options.CropPadding = 0,
    min_crop_area: options.MinCropArea = 1.0,
    horizontal_flip: options.HorizontalFlip = False,
    randaugment: options.RandAugment = 0,
    random_erasing: Annotated[
        float,
        typer.Option(rich_help_panel=options.AUGMENTATION, help="Probability that a box of an image is erased."),
    ] = 0.0,
    mixup: Annotated[float, typer.Option(rich_help_panel=options.AUGMENTATION, help="Alpha of mixup.")] = 0.0,
    cutmix: Annotated[
        float,
        typer.Option(
            rich_help_panel=options.AUGMENTATION,
            help="Alpha of CutMix; with --mixup, one of the two at random per batch.",
        ),
    ] = 0.0,
    ema_decay: Annotated[
        float,
        typer.Option(
            rich_help_panel=options.RECIPE,
            help="Validate and keep an exponential moving average of the weights, e.g. 0.999; 0 for none.",
        ),
    ] = 0.0,
    save_every: Annotated[
        int,
        typer.Option(rich_help_panel=options.OUTPUT, help="Also keep the weights of every n-th epoch; 0 for none."),
    ] = 0,
    precision: options.Precision = "auto",
    compile: options.Compile = "off",
    deterministic: options.Deterministic = True,
    device: options.Device = "auto",
    devices: Annotated[
        int,
        typer.Option(
            rich_help_panel=options.DEVICE, help="Devices on this machine, one process each; ignored under torchrun."
        ),
    ] = 1,
    micro_batch_size: Annotated[
        int, typer.Option(rich_help_panel=options.DEVICE, help="Images at once on a device; 0 for the whole batch.")
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(
            rich_help_panel=options.DEVICE,
            help="CPU threads; 0 for all cores. The last digits of the results depend on it.",
        ),
    ] = 0,
    workers: options.Workers = 0,
    checkpoint_s: Annotated[
        float, typer.Option(rich_help_panel=options.OUTPUT, help="Seconds between checkpoints.")
    ] = 60.0,
    logger: Annotated[
        Literal["csv", "tensorboard", "dvclive"],
        typer.Option(
            rich_help_panel=options.OUTPUT,
            help="csv writes history.csv at the end; the others also show curves while training runs.",
        ),
    ] = "csv",
    live_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=options.OUTPUT,
            help="Directory for the curves of --logger tensorboard or dvclive.",
            show_default="<log-dir>-live",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=options.OUTPUT, help="Train again even if finished.")
    ] = False,
) -> None:
    """Train one model and keep the weights of the epoch with the best validation accuracy.

    Writes model.safetensors, config.json and a model card to the output directory. The test split is not read. A run
    that was stopped or killed resumes when the same command is given again; a finished one is not repeated.
    """
    from pydantic import ValidationError

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.errors import UserError, explain
    from effvit.files import check_apart
    from effvit.model.presets import of_timm, preset
    from effvit.model.vit import ViTConfig
    from effvit.training.recipe import TrainConfig
    from effvit.training.run import train_to

    if timm is not None and model is not None:
        raise UserError(f"--model {model} --timm {timm}: expected one of them")
    if timm == "":
        raise UserError("--timm '': expected the name of a model in timm, e.g. vit_small_patch16_224")
    log = log_dir or Path(f"{output_dir}-log")
    start = init_from.expanduser() if init_from else None
    check_apart(output_dir, dataset_dir, log, *filter(None, [start]))
    check_apart(log, dataset_dir, output_dir, *filter(None, [start]))
    mechanism_options = options.parse_options(option)
    try:
        recipe = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            label_smoothing=label_smoothing,
            clip_norm=clip_norm,
            crop_padding=crop_padding,
            min_crop_area=min_crop_area,
            randaugment=randaugment,
            random_erasing=random_erasing,
            mixup=mixup,
            cutmix=cutmix,
            ema_decay=ema_decay,
            save_every=save_every,
            precision=precision,
            compile=compile,
            deterministic=deterministic,
            device=device,
            devices=devices,
            micro_batch_size=micro_batch_size,
            threads=threads,
            workers=workers,
            checkpoint_s=checkpoint_s,
            logger=logger,
        )
    except ValidationError as error:
        raise UserError(explain(error, "train", TrainConfig)) from error
    dataset = PreparedDataset.load(dataset_dir)
    recipe.check_image_size(dataset.image_size)
    sizes = preset(
        of_timm(timm) if timm else model or "tiny",
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        prefix_tokens=prefix_tokens,
        initializer_range=initializer_range,
    )
    config = ViTConfig.from_dict(
        sizes
        | {
            "image_size": dataset.image_size,
            "num_classes": len(dataset.classes),
            "hidden_dropout_prob": hidden_dropout_prob,
            "attention_probs_dropout_prob": attention_probs_dropout_prob,
            "value_conv": value_conv,
            "attention": attention,
            "attention_options": mechanism_options,
        }
    )
    if config.num_tokens > _MANY_TOKENS:
        typer.echo(_remark_on_tokens(config), err=True)
    summary = train_to(
        output_dir,
        log,
        config,
        dataset,
        recipe,
        seed=seed,
        horizontal_flip=horizontal_flip,
        init_from=start,
        overwrite=overwrite,
        live_dir=live_dir,
    )
    if summary:
        typer.echo(_block(summary, attention, output_dir, log))


def _remark_on_tokens(config: "ViTConfig") -> str:
    return (
        f"{config.num_tokens:,} tokens per image: exact attention's cost grows with the square of their number, here "
        f"{(config.num_tokens / _TOKENS_OF_224) ** 2:,.0f} times that of a 224-pixel image in patches of 16; "
        "`effvit choose` compares the mechanisms, a larger patch size means fewer tokens"
    )


def _block(summary: "Summary", attention: str, output_dir: Path, log_dir: Path) -> str:
    rows = {
        "best epoch": f"{summary.best_epoch} of {summary.epochs}",
        "validation accuracy": f"{summary.val_accuracy:.2%}",
        "attention": attention,
        "parameters": f"{summary.parameters:,}",
        "MACs per image": f"{summary.macs:,}",
        "device": summary.device,
        "training time": f"{summary.seconds:,.1f} s",
        "model": str(output_dir),
        "log": str(log_dir),
    }
    return "\n".join(f"{name:<21}{value}" for name, value in rows.items())
