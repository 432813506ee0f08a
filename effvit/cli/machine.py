"""``effvit machine``: what measured results belong to."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def machine(
    device: options.Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(rich_help_panel=options.FILES, help="JSON file to write; left alone if nothing changed."),
    ] = None,
) -> None:
    """Describe this machine: processor, threads, GPU, driver and versions, as recorded with every result.

    --device auto is the device that measurements use. With --output, it also reports what changed since the record.
    """
    from dataclasses import asdict

    from effvit import policy
    from effvit.device import measuring_device, pick_device, this_machine
    from effvit.provenance import record_machine

    where = measuring_device(device) if device == "auto" else pick_device(device)
    with policy.kept():
        policy.apply(where, deterministic=True)  # as training and measurements have it
        found = this_machine(where)
    if output:
        typer.echo(record_machine(output, found))
    else:
        for name, value in asdict(found).items():
            typer.echo(f"{name}: {'–' if value is None else value}")
