"""machine: the record of this machine, on which the measured stages depend."""

from effvit.cli.machine import machine
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, _ = study.load()
    machine(device=params.train.device, output=study.METRICS / "machine.json")
