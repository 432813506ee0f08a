"""``effvit scaling``: what one attention block costs as tokens grow, beside ``fused``."""

from typing import Annotated

import typer

from effvit.cli import options


def scaling(
    attention: options.Attention,
    output_dir: options.OutputDir,
    tokens: Annotated[list[int], typer.Option(help="Token count 1 + n²: a class token and n x n patches; repeatable.")],
    option: options.AttentionOptions = None,
    hidden_size: options.HiddenSize = 48,
    num_attention_heads: options.NumHeads = 4,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch.")] = 1,
    memory_mib: Annotated[float, typer.Option(help="MiB that a pass may take; larger ones are not tried.")] = 2048,
    budget_s: Annotated[
        float, typer.Option(help="Seconds of sampling each point; passes over 4 times that are not tried.")
    ] = 1.0,
    threads: options.Threads = None,
    device: options.Device = "auto",
) -> None:
    """Measure time and peak memory of one block's forward and training pass against the number of tokens.

    Writes macs.csv (always the same), scaling.csv (measured) and provenance.json. Points beyond the memory or time
    budget are rows that say so.
    """
    import pandas as pd
    import torch
    from rich.progress import track

    from effvit.files import staged_dir, write_csv
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import measuring_device, require_positive
    from effvit.measure.display import print_rows
    from effvit.measure.scaling import Block, measure_scaling
    from effvit.provenance import write_provenance

    require_positive(batch_size=batch_size, memory_mib=memory_mib, budget_s=budget_s, threads=threads)
    where = measuring_device(device)
    block = Block(attention, options.parse_options(option), hidden_size, num_attention_heads)
    counts = sorted(set(tokens))
    for count in counts:
        block.check(count)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    with staged_dir(output_dir, "macs.csv") as staged, measuring_alone():
        macs = pd.DataFrame({"tokens": counts, "macs": [block.macs(count) for count in counts]})
        write_csv(staged / "macs.csv", macs)
        points = measure_scaling(
            block, counts, batch_size=batch_size, memory_mib=memory_mib, budget_s=budget_s, device=where
        )
        rows = [row for rows in track(points, f"measuring {attention}", len(counts), transient=True) for row in rows]
        write_csv(staged / "scaling.csv", pd.DataFrame(rows).drop(columns="p90").astype({"n": "Int64"}))
        settings: dict[str, object] = {
            "attention": attention,
            "options": block.options,
            "tokens": counts,
            "batch_size": batch_size,
        }
        settings |= {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads, "memory_mib": memory_mib}
        write_provenance(staged, settings | {"budget_s": budget_s, "device": str(where), "dtype": "float32"})
    print_rows(f"one block of {attention}, width {hidden_size}", rows, ("tokens", "mode", "quantity"))
