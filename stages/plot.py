"""plot: the figures of the study."""

from effvit.cli.plot import plot
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, _ = study.load()
    plot(
        data_dir=study.PLOTS / "data",
        metrics_dir=study.METRICS,
        prepared_dir=study.PREPARED,
        output_dir=study.PLOTS / "figures",
        vector_dir=study.PLOTS / "vector",
        datasets=list(params.dataset),
        attentions=list(params.attention),
        seed=params.seeds[0],
    )
