"""The Typer application. Command modules import only Typer at the top, so that ``--help`` answers at once."""

import io
import signal
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from effvit import __version__
from effvit.cli.command import Command, Group
from effvit.errors import one_line_errors, print_error

GROUPS = {
    "Data": ("prepare", "samples"),
    "Train and use": ("train", "evaluate", "predict", "attention_map", "export", "deploy"),
    "Measure": (
        "choose",
        "benchmark",
        "scaling",
        "hardware",
        "bench_peers",
        "bench_data",
        "trace",
        "mechanisms",
        "machine",
    ),
    "Analyse": ("fidelity", "representations", "cells", "aggregate", "ablation", "variants"),
    "Report": ("plot", "report"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
_SETTINGS = {"help_option_names": ["-h", "--help"]}

# Of the Click that Typer uses, which is the installed one or its own.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    cls=Group,
    context_settings=_SETTINGS,
    rich_markup_mode=None,  # its tables of six columns leave the help texts none at 80 characters
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


for _title, _names in GROUPS.items():
    for _name in _names:
        _register = app.command(
            _name.replace("_", "-"), cls=Command, context_settings=_SETTINGS, rich_help_panel=_title
        )
        _register(getattr(import_module(f"effvit.cli.{_name}"), _name))


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
            print_error(error.format_message().replace("Value error, ", ""))  # as pydantic begins, which Typer asks
            status = error.exit_code
    raise SystemExit(status)
