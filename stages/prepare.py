"""prepare(dataset): a data set in the prepared format."""

from pathlib import Path

from effvit.cli.prepare import prepare
from effvit.errors import one_line_errors
from stages import study

with one_line_errors():
    params, (dataset,) = study.load()
    data = params.dataset[dataset]
    prepare(
        dataset=dataset,
        root=Path(data.root) if data.root else None,
        image_size=data.image_size,
        output_dir=study.PREPARED / dataset,
    )
