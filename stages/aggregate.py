"""aggregate: the cells that params.yaml names, and no others, as one summary and tidy tables."""

from effvit.cli.aggregate import aggregate
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, _ = study.load()
    aggregate(
        metrics_dir=study.METRICS,
        plots_data_dir=study.PLOTS / "data",
        datasets=list(params.dataset),
        attentions=list(params.attention),
        seeds=params.seeds,
    )
