"""deploy(dataset, attention): the model of the first seed as each runtime's files, their sizes and accuracy."""

from effvit.cli.deploy import deploy
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset, attention) = study.load_as_trained()
    deploy(
        model_dir=study.model_dir(dataset, attention, str(params.seeds[0])),
        dataset_dir=study.PREPARED / dataset,
        output_dir=study.deployed_dir(dataset, attention),
        log_dir=study.METRICS / "cells" / dataset / attention / "deploy",
    )
