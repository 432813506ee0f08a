"""report: the study's answers, tables, charts and figures as one page."""

from effvit.cli.report import report
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    study.load()
    report(
        data_dir=study.PLOTS / "data",
        figures_dir=study.PLOTS / "figures",
        vector_dir=study.PLOTS / "vector",
        output_dir=study.REPORT,
    )
