"""``effvit train``."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def train(
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    attention: options.Attention = "fused",
    option: options.AttentionOptions = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, data order and augmentation.")] = 0,
    log_dir: Annotated[
        Path | None, typer.Option(help="Directory for history.csv, timing.csv; <output-dir>-log if not given.")
    ] = None,
    model: options.Model = "tiny",
    timm: Annotated[
        str | None, typer.Option(help="In place of --model, a ViT of timm's: e.g. vit_small_patch16_224.")
    ] = None,
    patch_size: options.PatchSize = None,
    hidden_size: options.HiddenSize = None,
    num_hidden_layers: options.NumLayers = None,
    num_attention_heads: options.NumHeads = None,
    intermediate_size: options.IntermediateSize = None,
    prefix_tokens: options.PrefixTokens = None,
    initializer_range: Annotated[
        float | None, typer.Option(help="Deviation of the truncated normal start; the size's own if not given.")
    ] = None,
    hidden_dropout_prob: Annotated[float, typer.Option(help="Dropout of embeddings, projections, MLP.")] = 0.0,
    attention_probs_dropout_prob: Annotated[float, typer.Option(help="Dropout of attention.")] = 0.0,
    value_conv: options.ValueConv = 0,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Weights to start from: a model directory, or a ViT of timm, transformers, torchvision."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: options.BatchSize = 128,
    optimizer: options.Optimizer = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Decay of weight matrices.")] = 0.05,
    warmup_epochs: Annotated[float, typer.Option(help="Epochs of linear warm-up before the cosine.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target spread over all classes.")] = 0.0,
    clip_norm: options.ClipNorm = 0.0,
    crop_padding: options.CropPadding = 0,
    min_crop_area: options.MinCropArea = 1.0,
    horizontal_flip: options.HorizontalFlip = False,
    randaugment: options.RandAugment = 0,
    random_erasing: Annotated[float, typer.Option(help="Probability that a box of an image is erased.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha of CutMix; with mixup, either by turns of chance.")] = 0.0,
    ema_decay: Annotated[float, typer.Option(help="Validate and keep a running mean of weights, as 0.999.")] = 0.0,
    save_every: Annotated[int, typer.Option(help="Also keep the weights of every n-th epoch; 0 for none.")] = 0,
    precision: options.Precision = "32-true",
    compile: options.Compile = False,
    device: options.Device = "auto",
    devices: Annotated[int, typer.Option(help="Devices on this machine, one process each; not under torchrun.")] = 1,
    micro_batch_size: Annotated[int, typer.Option(help="Images at once on a device; 0 for all of a step.")] = 0,
    workers: options.Workers = 0,
    checkpoint_s: Annotated[float, typer.Option(help="Seconds between savings of an unfinished run.")] = 60.0,
) -> None:
    """Train one model; keep the weights that are best on the validation split.

    Writes model.safetensors, config.json and a model card to the output directory; the test split is not read. A run
    that was stopped or killed goes on when the same command is given again.
    """
    from pydantic import ValidationError

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.errors import UserError, explain
    from effvit.files import check_apart
    from effvit.model.presets import of_timm, preset
    from effvit.model.vit import ViTConfig
    from effvit.training.recipe import TrainConfig
    from effvit.training.run import train_to

    if timm == "":
        raise UserError("--timm '': expected the name of a model of timm's, e.g. vit_small_patch16_224")
    log = log_dir or Path(f"{output_dir}-log")
    start = init_from.expanduser() if init_from else None
    check_apart(output_dir, dataset_dir, log, *filter(None, [start]))
    check_apart(log, dataset_dir, output_dir, *filter(None, [start]))
    mechanism_options = options.parse_options(option)
    try:
        recipe = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,  # type: ignore[arg-type]
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
            precision=precision,  # type: ignore[arg-type]
            compile=compile,
            device=device,  # type: ignore[arg-type]
            devices=devices,
            micro_batch_size=micro_batch_size,
            workers=workers,
            checkpoint_s=checkpoint_s,
        )
    except ValidationError as error:
        raise UserError(explain(error, "train")) from error
    dataset = PreparedDataset.load(dataset_dir)
    recipe.check_image_size(dataset.image_size)
    sizes = preset(
        of_timm(timm) if timm else model,
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
    train_to(output_dir, log, config, dataset, recipe, seed=seed, horizontal_flip=horizontal_flip, init_from=start)
