"""scaling(attention): the cost of one attention block against the number of tokens."""

from effvit.cli.scaling import scaling
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (attention,) = study.load()
    scaling(
        attention=attention,
        option=study.as_options(params.attention[attention]),
        output_dir=study.METRICS / "scaling" / attention,
        hidden_size=params.model.hidden_size,
        num_attention_heads=params.model.num_attention_heads,
        device=params.train.device,
        **params.scaling.model_dump(),
    )
