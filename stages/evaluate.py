"""evaluate(dataset, attention, seed): the test split, once."""

from effvit.cli.evaluate import evaluate
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset, attention, seed) = study.load_as_trained()
    evaluate(
        model_dir=study.model_dir(dataset, attention, seed),
        dataset_dir=study.PREPARED / dataset,
        output_dir=study.cell_dir(dataset, attention, seed) / "evaluate",
        device=params.train.device,
    )
