"""train(dataset, attention, seed): one model and its log."""

from pathlib import Path

from effvit.cli.train import train
from effvit.errors import one_line_errors
from stages import study

if __name__ == "__main__":  # not again in processes that decode images
    with one_line_errors():
        params, (dataset, attention, seed) = study.load()
        data = params.dataset[dataset]
        train(
            dataset_dir=study.PREPARED / dataset,
            output_dir=study.model_dir(dataset, attention, seed),
            log_dir=study.cell_dir(dataset, attention, seed) / "train",
            attention=attention,
            option=study.as_options(params.attention[attention]),
            seed=int(seed),
            patch_size=data.patch_size,
            horizontal_flip=data.horizontal_flip,
            init_from=Path(params.model.init_from) if params.model.init_from else None,
            **params.model.vit_fields(),
            logger=params.train.logger,
            live_dir=study.live_dir(dataset, attention, seed),
            overwrite=True,  # DVC has decided that it is to run
            **params.train.model_dump(),
        )
