"""``effvit trace``: what attention blocks ask of a GPU, counted without one."""

from typing import Annotated, Any, Literal

import typer

from effvit.cli import options


def trace(
    attention: options.ComparedAttentions = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            rich_help_panel=options.ATTENTION,
            help="Option of the mechanism, with a single --attention, e.g. -o k=64; repeatable.",
        ),
    ] = None,
    width: Annotated[
        str,
        typer.Option(metavar="WIDTHxHEADS", rich_help_panel=options.MODEL, help="Width and number of heads."),
    ] = "384x6",
    tokens: Annotated[
        int,
        typer.Option(rich_help_panel=options.MEASUREMENT, help="Token count 1 + n² (a class token and n x n patches)."),
    ] = 1025,
    batch_size: Annotated[int, typer.Option(rich_help_panel=options.MEASUREMENT, help="Samples.")] = 64,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(rich_help_panel=options.DEVICE, help="bfloat16 runs under autocast."),
    ] = "bfloat16",
) -> None:
    """Count launches and bytes of attention blocks on CUDA, forward and backward, and compare the bytes with a minimum.

    It needs no GPU and measures no time: the calls are those of eager training on CUDA, on tensors without numbers. An
    operator is one launch. A single mechanism is also listed operator by operator.
    """
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from effvit.attention import available_attention, check_options
    from effvit.errors import UserError
    from effvit.measure.compare import require_positive
    from effvit.measure.subject import Block, parse_width
    from effvit.measure.trace import MOST_BACKWARD, MOST_FORWARD, MOST_RATIO, Traced, shown, trace_block

    require_positive(batch_size=batch_size)
    names = attention or list(available_attention())
    settings: dict[str, Any] = options.parse_options(option)
    if settings and len(names) > 1:
        raise UserError(f"--option {option[0] if option else ''}: needs a single --attention")
    traced: dict[str, Traced] = {}
    for name in names:
        block = Block(name, check_options(name, settings).model_dump(), *parse_width(width))
        block.check(tokens)
        traced[name] = trace_block(block, tokens, batch_size, bfloat16=precision == "bfloat16")

    budget = f"budget: {MOST_FORWARD} and {MOST_BACKWARD} launches, {MOST_RATIO:g} times the minimum; * above it"
    table = Table(title=f"width {width}, {batch_size} x {tokens:,} tokens, {precision}", caption=budget)
    table.add_column("mechanism", no_wrap=True)
    for heading in ("launches", "backward", "GB", "backward", "x minimum"):
        table.add_column(heading, justify="right")
    for name, found in traced.items():
        table.add_row(name, *(cell + "*" * above for cell, above in shown(found)))
    console = Console()
    console.print(table)
    if len(traced) > 1:
        return
    for which, passed in (("forward", found.forward), ("backward", found.backward)):
        counts, sizes = Counter(name for name, _ in passed.calls), Counter[str]()
        for name, size in passed.calls:
            sizes[name] += size
        table = Table(title=which)
        table.add_column("operator", no_wrap=True)
        for heading in ("launches", "MB"):
            table.add_column(heading, justify="right")
        for name, size in sizes.most_common():
            table.add_row(name, str(counts[name]), f"{size / 1e6:,.1f}")
        console.print(table)
