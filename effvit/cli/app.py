"""The Typer application. Command modules import only Typer at the top, so that ``--help`` answers at once."""

import io
import signal
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from effvit import __version__
from effvit.errors import one_line_errors, tell

COMMANDS = (
    "prepare",
    "samples",
    "train",
    "evaluate",
    "predict",
    "attention_map",
    "export",
    "deploy",
    "hardware",
    "benchmark",
    "scaling",
    "fidelity",
    "representations",
    "bench_peers",
    "bench_data",
    "choose",
    "aggregate",
    "plot",
    "ablation",
    "report",
    "mechanisms",
    "machine",
)

# Of the Click that Typer uses, which is the installed one or its own.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    help="Efficient attention in Vision Transformers, trained and measured under one protocol.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"effvit {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Efficient attention in Vision Transformers, trained and measured under one protocol."""


for _name in COMMANDS:
    app.command(_name.replace("_", "-"))(getattr(import_module(f"effvit.cli.{_name}"), _name))


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    with one_line_errors():
        try:
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
            if status == 128 + signal.SIGINT:  # Typer's for Ctrl-C, of which it says nothing
                raise KeyboardInterrupt
        except _ClickException as error:
            tell(error.format_message())
            status = error.exit_code
    raise SystemExit(status)
