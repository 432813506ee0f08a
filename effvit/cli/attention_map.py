"""``effvit attention-map``."""

from pathlib import Path
from typing import Annotated

import typer

from effvit.cli import options


def attention_map(
    images: options.Images,
    model_dir: options.ModelDir,
    output: Annotated[Path, typer.Option(rich_help_panel=options.FILES, help="PNG file to write.")],
    dataset_dir: options.DatasetDirIfNeeded = None,
    device: options.Device = "auto",
) -> None:
    """Draw where a model looks: attention rollout from the class token, over each image."""
    import os

    from effvit.data.loading.prepared import PreparedDataset
    from effvit.device import pick_device
    from effvit.errors import UserError
    from effvit.evaluation.overlay import map_sheet
    from effvit.evaluation.predict import rollout_maps, view_of
    from effvit.files import staged_file
    from effvit.model.checkpoint import load_model

    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: expected a file name that ends in .png")
    model = load_model(model_dir, pick_device(device))
    view = view_of(model, PreparedDataset.load(dataset_dir) if dataset_dir else None)
    batch = view.read(images)
    logits, maps = rollout_maps(model, batch, view.mean, view.std)
    stems = (os.fsencode(path.stem).decode("utf-8", "replace") for path in images)
    titles = [f"{stem}\nas {view.classes[i]}" for stem, i in zip(stems, logits.argmax(dim=1).tolist(), strict=True)]
    figure = map_sheet(list(batch), list(maps), titles, f"{model.config.attention}: attention rollout")
    with staged_file(output) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})
    typer.echo(f"written to {output}")
