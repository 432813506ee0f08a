"""representations(dataset): layers and heads of all mechanisms' models of the first seed, on the same images."""

from effvit.cli.representations import representations
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset,) = study.load_as_trained()
    representations(
        model_dirs=[study.model_dir(dataset, attention, params.seeds[0]) for attention in params.attention],
        dataset_dir=study.PREPARED / dataset,
        output_dir=study.METRICS / "analysis" / dataset / "representations",
        device=params.train.device,
    )
