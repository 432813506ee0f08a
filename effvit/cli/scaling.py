"""``effvit scaling``: cost of one attention block and of a whole model against the number of tokens, vs ``fused``."""

from typing import Annotated, Any

import typer

from effvit.cli import options

_PART = ("precision", "execution", "scope", "hidden_size")  # of which there is a table each


def scaling(
    attention: options.Attention,
    output_dir: options.OutputDir,
    tokens: Annotated[list[int], options.Tokens],
    option: options.AttentionOptions = None,
    model: options.Model = "tiny",
    patch_size: options.PatchSize = None,
    hidden_size: options.HiddenSize = None,
    num_hidden_layers: options.NumLayers = None,
    num_attention_heads: options.NumHeads = None,
    intermediate_size: options.IntermediateSize = None,
    hidden_dropout_prob: options.HiddenDropout = 0.0,
    attention_probs_dropout_prob: options.AttentionDropout = 0.0,
    value_conv: options.ValueConv = 0,
    width: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEADS,...",
            parser=options.words,
            callback=options.joined,
            rich_help_panel=options.MODEL,
            help="Widths and numbers of heads of the block; the first is that of tables and figures.",
            show_default="those of the model",
        ),
    ] = None,
    tokens_per_batch: Annotated[
        int,
        typer.Option(rich_help_panel=options.MEASUREMENT, help="Also measure batches of about this many tokens."),
    ] = 4096,
    memory_mib: Annotated[
        float, typer.Option(rich_help_panel=options.MEASUREMENT, help="Skip passes that need more MiB.")
    ] = 2048,
    budget_s: options.BudgetOfPoint = 1.0,
    precision: options.MeasuredPrecision = None,
    execution: options.MeasuredExecution = None,
    deterministic: options.Deterministic = True,
    threads: options.Threads = None,
    device: options.Device = "auto",
) -> None:
    """Measure time and peak memory of a forward and a training pass against the number of tokens.

    It measures one attention block and the whole model, whose images grow while the patch size stays; one sample at a
    time, and in batches of a fixed number of tokens. Writes macs.csv (always the same), scaling.csv (measured) and
    provenance.json. A point beyond the memory or time limit is a row that says so.
    """
    import pandas as pd
    import torch
    from rich.progress import track

    from effvit import policy
    from effvit.device import measuring_device, this_machine
    from effvit.files import staged_dir, write_csv
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import require_positive
    from effvit.measure.display import print_rows, remark_on_launches
    from effvit.measure.execution import executions
    from effvit.measure.scaling import measure_scaling
    from effvit.measure.subject import Block, Model, Subject, parse_width, square_grid
    from effvit.model.presets import preset
    from effvit.model.vit import ViTConfig
    from effvit.provenance import write_provenance

    settings: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "memory_mib": memory_mib, "budget_s": budget_s}
    require_positive(**settings, threads=threads)
    where = measuring_device(device)
    ways = executions(precision or ["float32"], execution or ["eager"], where)
    counts = sorted(set(tokens))
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
            "image_size": sizes["patch_size"] * square_grid(counts[-1])[0],
            "hidden_dropout_prob": hidden_dropout_prob,
            "attention_probs_dropout_prob": attention_probs_dropout_prob,
            "value_conv": value_conv,
            "attention": attention,
            "attention_options": options.parse_options(option),
        }
    )
    widths = [parse_width(text) for text in width or [f"{config.hidden_size}x{config.num_attention_heads}"]]
    subjects: list[Subject] = [Block(attention, config.attention_options, *each, value_conv) for each in widths]
    subjects.append(Model(config))
    for subject in subjects:
        for count in counts:
            subject.check(count)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    files = ("macs.csv", "scaling.csv", "provenance.json")
    with staged_dir(output_dir, files) as staged, measuring_alone(where), policy.kept():
        macs = [
            {
                "scope": s.scope,
                "hidden_size": s.width,
                "tokens": n,
                "macs": s.macs(n),
                "fused_macs": s.baseline().macs(n),
            }
            for s in subjects
            for n in counts
        ]
        write_csv(staged / "macs.csv", pd.DataFrame(macs))
        rows = []
        for how in ways:
            how.apply(where, deterministic=deterministic)
            points = (rows for s in subjects for rows in measure_scaling(s, counts, **settings, device=where, how=how))
            title = f"measuring {attention}, {how.precision}, {how.mode}"
            steps = track(points, title, len(subjects) * len(counts), transient=True)
            rows += [row for rows in steps for row in rows]
        write_csv(staged / "scaling.csv", pd.DataFrame(rows).drop(columns="p90").astype({"n": "Int64"}))
        record = settings | {"tokens": counts, "widths": widths, "model": config.model_dump()}
        record |= {"dtype": ways[0].precision, "execution": ways[0].mode, "deterministic": deterministic}
        write_provenance(staged, record, this_machine(where))
    if remark := remark_on_launches(rows):
        typer.echo(remark, err=True)
    of_parts = dict.fromkeys(tuple(row[key] for key in _PART) for row in rows)
    for part in of_parts:
        for batch, which in (
            ("one", "one sample at a time"),
            ("tokens", f"batches of up to {tokens_per_batch:,} tokens"),
        ):
            chosen = [row for row in rows if (*(row[key] for key in _PART), row["batch"]) == (*part, batch)]
            if chosen:
                title = "{2} with {4}, width {3}, {0}, {1}, {5}".format(*part, attention, which)
                print_rows(title, chosen, ("tokens", "mode", "quantity"))
