"""One training run on disk: the loop's epochs into a model directory and a log directory."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from effvit.checkpoint import save_model
from effvit.config import TrainConfig
from effvit.data.prepared import PreparedDataset
from effvit.files import staged_dir, write_csv, write_json
from effvit.pretrained import start_from
from effvit.provenance import write_provenance
from effvit.training import DivergedError, Epoch, fit
from effvit.vit import ViT, ViTConfig

_MEASURED = ["seconds", "images_per_second"]


class Best:
    """The model of the epoch with the highest validation accuracy; of equals, the one with the lowest loss."""

    def __init__(self) -> None:
        self.epoch: Epoch | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def offer(self, epoch: Epoch, model: ViT) -> bool:
        """Keep a copy of the model's weights if it is the best so far; say whether it is."""
        if self.epoch is not None and self._rank(epoch) <= self._rank(self.epoch):
            return False
        self.epoch = epoch
        self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return True

    @staticmethod
    def _rank(epoch: Epoch) -> tuple[float, float]:
        return epoch.val_accuracy, -epoch.val_loss

    def save(self, config: ViTConfig, directory: Path) -> None:
        """Write the kept weights as a model directory."""
        model = ViT(config)
        model.load_state_dict(self.weights)
        save_model(model, directory)


def train_to(
    output_dir: Path,
    log_dir: Path,
    config: ViTConfig,
    dataset: PreparedDataset,
    recipe: TrainConfig,
    *,
    seed: int,
    horizontal_flip: bool,
    init_from: Path | None = None,
) -> None:
    """Train, and write the best model to ``output_dir`` and the log to ``log_dir``.

    With ``init_from`` the model starts from those weights, and the log says what became of each (``start.json``).

    If training diverges, the best model so far is left in ``<output_dir>.diverged`` and nothing else is written.

    Raises:
        DivergedError: the loss is not finite.
        UserError: ``init_from`` has no weights that fit.
    """
    history: list[Epoch] = []
    best = Best()
    console = Console(stderr=True)
    with staged_dir(output_dir) as model_dir, staged_dir(log_dir) as logs, _progress(console) as progress:
        task = progress.add_task(
            config.attention, total=dataset.counts["train"] * recipe.epochs, loss=float("nan"), accuracy=float("nan")
        )

        def show(images: int, loss: float, accuracy: float) -> None:
            progress.update(task, advance=images, loss=loss, accuracy=accuracy)

        start = {"from": str(init_from) if init_from else None}

        def init(model: ViT) -> None:
            if init_from is not None:
                report = start_from(init_from, model)
                console.print("\n".join(report.lines()), highlight=False, markup=False, soft_wrap=True)
                write_json(logs / "start.json", asdict(report))
                start["sha256"] = report.sha256

        epochs = fit(config, dataset, recipe, seed=seed, horizontal_flip=horizontal_flip, on_step=show, init=init)
        try:
            for epoch, model in epochs:
                history.append(epoch)
                chosen = best.offer(epoch, model)
                console.print(_line(epoch, recipe.epochs, chosen), highlight=False, soft_wrap=True)
                if recipe.save_every and epoch.epoch % recipe.save_every == 0:
                    kept = model_dir / f"epoch-{epoch.epoch:03d}"
                    kept.mkdir()
                    save_model(model, kept)
        except DivergedError:
            if best.epoch is not None:
                with staged_dir(output_dir.with_name(f"{output_dir.name}.diverged")) as rescued:
                    best.save(config, rescued)
            raise
        best.save(config, model_dir)
        table = pd.DataFrame([asdict(epoch) for epoch in history])
        write_csv(logs / "history.csv", table.drop(columns=_MEASURED))
        write_csv(logs / "timing.csv", table[["epoch", *_MEASURED]].round(3))
        write_provenance(
            logs,
            {"model": config.model_dump(), "start": start, "train": recipe.model_dump()}
            | {"dataset": dataset.name, "seed": seed},
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _line(epoch: Epoch, epochs: int, best: bool) -> str:
    return (
        f"epoch {epoch.epoch:>3}/{epochs}  loss {epoch.train_loss:.3f}  accuracy {epoch.train_accuracy:.1%}  "
        f"validation {epoch.val_loss:.3f} {epoch.val_accuracy:.1%}{' *' if best else '  '}  "
        f"{epoch.images_per_second:,.0f} images/s"
    )
