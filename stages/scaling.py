"""scaling(attention): the cost of one attention block and of a model against the number of tokens."""

from effvit.cli.scaling import scaling
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (attention,) = study.load()
    scaling(
        attention=attention,
        option=study.as_options(params.attention[attention]),
        output_dir=study.METRICS / "scaling" / attention,
        device=params.train.device,
        deterministic=params.train.deterministic,
        **params.model.model_dump(exclude={"name", "initializer_range", "init_from"}),
        **params.scaling.model_dump(),
    )
