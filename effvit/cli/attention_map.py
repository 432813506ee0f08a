"""``effvit attention-map``."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def attention_map(
    images: options.Images,
    model_dir: options.ModelDir,
    dataset_dir: options.DatasetDir,
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    device: options.Device = "auto",
) -> None:
    """Draw where a model looks: attention rollout from the class token, laid over each image."""
    import os

    import numpy as np

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.data.sources.images import load_image
    from effvit.device import pick_device
    from effvit.errors import UserError
    from effvit.evaluation.overlay import map_sheet
    from effvit.evaluation.predict import check_fits, rollout_maps
    from effvit.files import staged_file
    from effvit.model.checkpoint import load_model

    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: expected a file name that ends in .png")
    model = load_model(model_dir, pick_device(device))
    dataset = PreparedDataset.load(dataset_dir)
    dataset = check_fits(model, dataset)
    batch = np.stack([load_image(path, dataset.image_size, dataset.storage) for path in images])
    logits, maps = rollout_maps(model, batch, dataset.mean, dataset.std)
    stems = (os.fsencode(path.stem).decode("utf-8", "replace") for path in images)
    titles = [f"{stem}\nas {dataset.classes[i]}" for stem, i in zip(stems, logits.argmax(dim=1).tolist(), strict=True)]
    figure = map_sheet(list(batch), list(maps), titles, f"{model.config.attention}: attention rollout")
    with staged_file(output) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})
    typer.echo(f"written to {output}")
