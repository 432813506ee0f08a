"""hardware(dataset, attention): the deployed model on one thread, one image at a time."""

from effvit.cli.hardware import hardware
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset, attention) = study.load()
    hardware(
        deployed_dir=study.deployed_dir(dataset, attention),
        output_dir=study.METRICS / "cells" / dataset / attention / "hardware",
        budget_s=params.benchmark.budget_s,
    )
