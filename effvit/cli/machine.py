"""``effvit machine``: what measured results belong to."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def machine(
    device: options.Device = "auto",
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the record; one with the same content is left as it is.")
    ] = None,
) -> None:
    """Describe this machine: processor, threads, GPU, driver and versions, as they are recorded with every result.

    With auto it is the device that measurements take. With --output, say whether the machine in the file is another.
    """
    from dataclasses import asdict

    from effvit.device import measuring_device, pick_device, this_machine
    from effvit.provenance import record_machine

    found = this_machine(measuring_device(device) if device == "auto" else pick_device(device))
    if output:
        typer.echo(record_machine(output, found))
    else:
        for name, value in asdict(found).items():
            typer.echo(f"{name}: {'–' if value is None else value}")
