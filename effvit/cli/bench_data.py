"""``effvit bench-data``: speed of the input pipeline, of the training step and of the whole loop."""

from effvit.cli import options


def bench_data(
    dataset_dir: options.DatasetDir,
    output_dir: options.OutputDir,
    attention: options.Attention = "fused",
    option: options.AttentionOptions = None,
    model: options.Model = "tiny",
    patch_size: options.PatchSize = None,
    hidden_size: options.HiddenSize = None,
    num_hidden_layers: options.NumLayers = None,
    num_attention_heads: options.NumHeads = None,
    intermediate_size: options.IntermediateSize = None,
    batch_size: options.BatchSize = 128,
    optimizer: options.Optimizer = "adamw",
    clip_norm: options.ClipNorm = 1.0,
    crop_padding: options.CropPadding = 4,
    min_crop_area: options.MinCropArea = 1.0,
    randaugment: options.RandAugment = 0,
    horizontal_flip: options.HorizontalFlip = True,
    workers: options.Workers = 0,
    precision: options.Precision = "auto",
    compile: options.Compile = "off",
    deterministic: options.Deterministic = True,
    budget_s: options.Budget = 60.0,
    threads: options.Threads = None,
    device: options.Device = "auto",
) -> None:
    """Measure images/s of the input pipeline alone, of the training step alone and of training, in turns.

    With the `peers` extra, timm's model of the same size does the same step. Writes throughput.csv (measured) and
    provenance.json.
    """
    from importlib.util import find_spec

    import pandas as pd
    import torch
    from pydantic import ValidationError

    from effvit import policy
    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device, this_machine
    from effvit.errors import UserError, explain
    from effvit.files import check_apart, staged_dir, write_csv
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import require_positive
    from effvit.measure.throughput import measure_throughput, print_throughput
    from effvit.model.presets import preset
    from effvit.model.vit import ViTConfig
    from effvit.provenance import write_provenance
    from effvit.training.allocator import keep_freed_memory
    from effvit.training.recipe import TrainConfig

    check_apart(output_dir, dataset_dir)
    require_positive(budget_s=budget_s, threads=threads)
    mechanism_options = options.parse_options(option)
    try:
        recipe = TrainConfig.model_validate(
            {
                "epochs": 1,
                "lr": 1e-3,
                "batch_size": batch_size,
                "optimizer": optimizer,
                "clip_norm": clip_norm,
                "crop_padding": crop_padding,
                "min_crop_area": min_crop_area,
                "randaugment": randaugment,
                "workers": workers,
                "precision": precision,
                "compile": compile,
                "deterministic": deterministic,
                "device": device,
            }
        )
    except ValidationError as error:
        raise UserError(explain(error, "train", TrainConfig)) from error
    dataset = PreparedDataset.load(dataset_dir)
    recipe.check_image_size(dataset.image_size)
    sizes = preset(
        model,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
    )
    config = ViTConfig.from_dict(
        sizes
        | {
            "image_size": dataset.image_size,
            "num_classes": len(dataset.classes),
            "attention": attention,
            "attention_options": mechanism_options,
        }
    )
    if threads:
        torch.set_num_threads(threads)
    where = pick_device(device)
    recipe = recipe.model_copy(update={"precision": policy.training_precision(precision, where)})
    kept = keep_freed_memory()
    files = ("throughput.csv", "provenance.json")
    with staged_dir(output_dir, files) as staged, measuring_alone(where), policy.kept():
        policy.apply(where, deterministic=deterministic)
        rows = measure_throughput(
            config,
            dataset,
            recipe,
            horizontal_flip=horizontal_flip,
            peer=find_spec("timm") is not None,
            budget_s=budget_s,
            device=where,
        )
        write_csv(staged / "throughput.csv", pd.DataFrame(rows))
        settings = {"horizontal_flip": horizontal_flip, "freed_memory_kept": kept, "budget_s": budget_s}
        models = {"model": config.model_dump(), "train": recipe.model_dump(), "dataset": dataset.name}
        write_provenance(staged, models | settings, this_machine(where))
    print_throughput(rows)
