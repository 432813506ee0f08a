"""fidelity(dataset): errors to exact attention and accuracy with attention replaced, with models of the first seed."""

from effvit.cli.fidelity import fidelity
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset,) = study.load_as_trained()
    fidelity(
        model_dirs=[study.model_dir(dataset, attention, params.seeds[0]) for attention in params.attention],
        dataset_dir=study.PREPARED / dataset,
        output_dir=study.METRICS / "analysis" / dataset / "fidelity",
        device=params.train.device,
    )
