"""``effvit bench-peers``: our attention modules vs the public ones, at equal hyperparameters."""

from typing import Annotated, Any, Literal

import typer

from effvit.cli import options

_TOKENS = (65, 197, 401, 1025, 4097)


def bench_peers(
    output_dir: options.OutputDir,
    attention: options.ComparedAttentions = None,
    width: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEADS,...",
            parser=options.words,
            callback=options.joined,
            rich_help_panel=options.MODEL,
            help="Widths and numbers of heads.",
            show_default="192x3,384x6",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N,...",
            parser=options.whole_numbers,
            callback=options.joined,
            rich_help_panel=options.MEASUREMENT,
            help=options.TOKENS_HELP,
            show_default=",".join(map(str, _TOKENS)),
        ),
    ] = None,
    tokens_per_batch: Annotated[
        int, typer.Option(rich_help_panel=options.MEASUREMENT, help="Tokens per batch, all samples together.")
    ] = 16384,
    budget_s: Annotated[
        float, typer.Option(rich_help_panel=options.MEASUREMENT, help="Seconds of sampling per point.")
    ] = 5.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(rich_help_panel=options.DEVICE, help="bfloat16 runs under autocast."),
    ] = "float32",
    threads: options.Threads = None,
    device: options.Device = "auto",
) -> None:
    """Time each module and its public peer in turns, forward and forward + backward.

    Needs the `peers` extra. Writes peers.csv and peers.png (measured) and provenance.json. A mechanism without a public
    peer is timed alone.
    """
    import pandas as pd
    import torch
    from rich.progress import track

    from effvit import policy
    from effvit.attention import available_attention
    from effvit.device import measuring_device, this_machine
    from effvit.figures.peers import peer_ratios
    from effvit.figures.style import save
    from effvit.files import staged_dir, write_csv
    from effvit.measure.alone import measuring_alone
    from effvit.measure.compare import require_positive
    from effvit.measure.peers import compare_with_peer, grid_of_points, print_ratios, require_peers
    from effvit.measure.public import PEERS, PLAIN
    from effvit.measure.subject import parse_width, square_grid
    from effvit.provenance import version_of, write_provenance

    require_positive(tokens_per_batch=tokens_per_batch, budget_s=budget_s, threads=threads)
    where = measuring_device(device)
    mechanisms = attention or list(available_attention())
    require_peers(mechanisms)
    counts = tokens or list(_TOKENS)
    for count in counts:
        square_grid(count)
    widths = [parse_width(text) for text in width or ["192x3", "384x6"]]
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    points = list(grid_of_points(mechanisms, widths, counts))
    common: dict[str, Any] = {
        "tokens_per_batch": tokens_per_batch,
        "budget_s": budget_s,
        "dtype": getattr(torch, dtype),
    }
    files = ("peers.csv", "peers.png", "provenance*.json")
    with staged_dir(output_dir, files) as staged, measuring_alone(where), policy.kept():
        policy.apply(where, deterministic=False, tf32=False)
        rows = [
            compare_with_peer(point, **common, device=where) for point in track(points, "measuring", transient=True)
        ]
        table = pd.DataFrame(rows)
        write_csv(staged / "peers.csv", table)
        if not (compared := table.dropna(subset="peer")).empty:
            save(peer_ratios(compared), staged / "peers.png")
        settings = {"attention": mechanisms, "widths": widths, "tokens": counts, "dtype": dtype}
        packages = {PEERS[name].package for name in mechanisms if name in PEERS} - {PLAIN}
        settings["peers"] = {package: version_of(package) for package in sorted(packages)}
        settings |= {"tokens_per_batch": tokens_per_batch, "budget_s": budget_s}
        write_provenance(staged, settings, this_machine(where))
    print_ratios(rows)
