"""prepare(dataset): a data set in the prepared format."""

from pathlib import Path

from effvit.cli.prepare import prepare
from effvit.errors import one_line_errors
from stages import study

if __name__ == "__main__":  # not again in its worker processes
    with one_line_errors():
        params, (dataset,) = study.load()
        data = params.dataset[dataset]
        prepare(
            dataset=dataset,
            root=Path(data.root) if data.root else None,
            image_size=data.image_size,
            classes=Path(data.classes) if data.classes else None,
            num_classes=data.num_classes,
            test_share=data.test_share,
            label_level=data.label_level,
            image_column=data.image_column,
            label_column=data.label_column,
            output_dir=study.PREPARED / dataset,
        )
