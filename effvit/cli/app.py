"""The Typer application. Command modules import only Typer at the top, so that ``--help`` answers at once."""

from importlib import import_module

import typer

from effvit.errors import one_line_errors

COMMANDS = (
    "prepare",
    "samples",
    "train",
    "evaluate",
    "predict",
    "attention_map",
    "benchmark",
    "scaling",
    "bench_peers",
    "bench_data",
    "aggregate",
    "plot",
    "mechanisms",
)

app = typer.Typer(
    help="Efficient attention in Vision Transformers, trained and measured under one protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name in COMMANDS:
    app.command(_name.replace("_", "-"))(getattr(import_module(f"effvit.cli.{_name}"), _name))


def main() -> None:
    """Entry point of the console script."""
    with one_line_errors():
        app()
