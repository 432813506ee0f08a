"""benchmark(dataset, attention): the cost of one model, vs the same model with fused attention."""

from effvit.cli.benchmark import benchmark
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset, attention) = study.load()
    data = params.dataset[dataset]
    benchmark(
        attention=attention,
        option=study.as_options(params.attention[attention]),
        output_dir=study.METRICS / "cells" / dataset / attention / "benchmark",
        image_size=data.image_size,
        patch_size=data.patch_size,
        num_classes=data.num_classes,
        device=params.train.device,
        deterministic=params.train.deterministic,
        **params.model.model_dump(exclude={"name", "initializer_range", "init_from"}),
        **params.benchmark.model_dump(),
    )
