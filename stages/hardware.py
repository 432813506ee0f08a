"""hardware(dataset, attention): the model of the first seed on one thread, one image at a time."""

from effvit.cli.hardware import hardware
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset, attention) = study.load()
    hardware(
        model_dir=study.model_dir(dataset, attention, str(params.seeds[0])),
        dataset_dir=study.PREPARED / dataset,
        output_dir=study.METRICS / "cells" / dataset / attention / "hardware",
        budget_s=params.benchmark.budget_s,
    )
