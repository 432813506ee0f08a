"""``effvit benchmark``: what a model costs, compared with the same model with ``fused`` attention."""

from typing import Annotated, Any

import typer

from effvit.cli import options


def benchmark(
    attention: options.Attention,
    output_dir: options.OutputDir,
    option: options.AttentionOptions = None,
    image_size: options.ImageSize = 32,
    model: options.Model = "tiny",
    patch_size: options.PatchSize = None,
    num_classes: Annotated[int, typer.Option(rich_help_panel=options.MODEL, help="Number of classes.")] = 10,
    hidden_size: options.HiddenSize = None,
    num_hidden_layers: options.NumLayers = None,
    num_attention_heads: options.NumHeads = None,
    intermediate_size: options.IntermediateSize = None,
    prefix_tokens: options.PrefixTokens = None,
    hidden_dropout_prob: options.HiddenDropout = 0.0,
    attention_probs_dropout_prob: options.AttentionDropout = 0.0,
    value_conv: options.ValueConv = 0,
    batch_size: Annotated[int, typer.Option(rich_help_panel=options.MEASUREMENT, help="Images per batch.")] = 64,
    memory_mib: Annotated[
        float, typer.Option(rich_help_panel=options.MEASUREMENT, help="MiB that the largest batch may take.")
    ] = 256,
    budget_s: Annotated[
        float, typer.Option(rich_help_panel=options.MEASUREMENT, help="Seconds of sampling per quantity.")
    ] = 1.0,
    precision: options.MeasuredPrecision = None,
    execution: options.MeasuredExecution = None,
    deterministic: options.Deterministic = True,
    threads: options.Threads = None,
    device: options.Device = "auto",
) -> None:
    """Measure parameters, exact MACs, latency, throughput, training step and memory, each vs fused attention.

    Writes model.json (always the same), cost.csv (measured) and provenance.json.
    """
    import pandas as pd
    import torch
    from rich.progress import track

    from effvit import policy
    from effvit.device import measuring_device, this_machine
    from effvit.files import staged_dir, write_csv, write_json
    from effvit.measure.alone import measuring_alone
    from effvit.measure.benchmark import COST_STEPS, measure_cost, model_size
    from effvit.measure.compare import require_positive
    from effvit.measure.display import print_rows, remark_on_launches
    from effvit.measure.execution import executions
    from effvit.model.presets import preset
    from effvit.model.vit import ViTConfig
    from effvit.provenance import write_provenance

    require_positive(batch_size=batch_size, memory_mib=memory_mib, budget_s=budget_s, threads=threads)
    where = measuring_device(device)
    ways = executions(precision or ["float32"], execution or ["eager"], where)
    sizes = preset(
        model,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        prefix_tokens=prefix_tokens,
    )
    config = ViTConfig.from_dict(
        sizes
        | {
            "image_size": image_size,
            "num_classes": num_classes,
            "hidden_dropout_prob": hidden_dropout_prob,
            "attention_probs_dropout_prob": attention_probs_dropout_prob,
            "value_conv": value_conv,
            "attention": attention,
            "attention_options": options.parse_options(option),
        }
    )
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    files = ("model.json", "cost.csv", "provenance.json")
    with staged_dir(output_dir, files) as staged, measuring_alone(where), policy.kept():
        size = model_size(config)
        write_json(staged / "model.json", size)
        settings: dict[str, Any] = {"batch_size": batch_size, "memory_mib": memory_mib, "budget_s": budget_s}
        rows = []
        for how in ways:
            how.apply(where, deterministic=deterministic)
            steps = measure_cost(config, **settings, device=where, how=how)
            title = f"measuring {attention}, {how.precision}, {how.mode}"
            rows += [row for rows in track(steps, title, COST_STEPS, transient=True) for row in rows]
        write_csv(staged / "cost.csv", pd.DataFrame(rows).astype({"batch_size": "Int64", "n": "Int64"}))
        settings |= {"dtype": ways[0].precision, "execution": ways[0].mode, "deterministic": deterministic}
        settings |= {"model": config.model_dump()}
        write_provenance(staged, settings, this_machine(where))
    if remark := remark_on_launches(rows):
        typer.echo(remark, err=True)
    print_rows(
        f"{attention}: {size['parameters']:,} parameters, {size['macs'] / 1e6:,.2f} M multiply-adds per image",
        rows,
        (*(("precision", "execution") if len(ways) > 1 else ()), "quantity", "batch_size"),
    )
