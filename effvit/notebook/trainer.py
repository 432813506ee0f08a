"""Training by Python, by the recipe and the loop that `effvit train` has."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader

from effvit import policy
from effvit.data.loading.loaders import Loaders, length_of
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError, did_you_mean, explain
from effvit.model.checkpoint import unwrapped
from effvit.model.trained_on import TrainedOn
from effvit.notebook.inputs import check_classes, count_classes, first_batch, require_module
from effvit.notebook.scores import evaluate
from effvit.training.loop import Epoch, Step, Training
from effvit.training.optimizer import build_optimizer
from effvit.training.recipe import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

    from effvit.training.run import Best

_OF_RUNS = ("checkpoint_s", "devices", "logger", "save_every")
_OF_PREPARED = (
    "batch_size",
    "crop_padding",
    "cutmix",
    "horizontal_flip",
    "min_crop_area",
    "mixup",
    "randaugment",
    "random_erasing",
    "workers",
)
_BATCH_SIZE = 128
_LARGEST_SEED = 2**32 - 1
_VALIDATION = ["val_loss", "val_accuracy"]


class Trainer:
    """Train an image classifier in place, and see how that went.

    Args:
        model: takes images ``(B, channels, H, W)`` and returns logits ``(B, classes)``, or an object with ``logits``.
        train: a prepared data set, whose validation part serves for validation and whose test split is not read; or a
            DataLoader that gives normalised images and labels ``(B,)``.
        validation: a DataLoader likewise, if there is one.
        epochs: passes over the training images; required.
        lr: peak learning rate.
        optimizer: adamw; or muon for the matrices of the blocks, where they are known.
        device: auto, cpu, cuda or mps; the model is moved there and stays.
        seed: of order, augmentation, dropout and random features. The model's own weights are there already.
        progress: show a bar and a line an epoch, on stderr.
        **recipe: other fields of the recipe as in docs/training.md, such as ``batch_size`` (128), ``weight_decay``,
            ``warmup_epochs``, ``label_smoothing``, ``precision`` and ``ema_decay``. Those of batches and augmentation,
            and ``horizontal_flip``, are of prepared data sets: loaders have their own.

    Raises:
        UserError: a value or field of the recipe that is none, or data and a model that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        train: PreparedDataset | DataLoader[Any],
        validation: DataLoader[Any] | None = None,
        *,
        epochs: int | None = None,
        lr: float = 1e-3,
        optimizer: str = "adamw",
        device: str = "auto",
        seed: int = 0,
        progress: bool = True,
        **recipe: Any,
    ) -> None:
        require_module(model)
        if epochs is None:
            raise UserError("epochs: missing; expected a number of passes over the training images, e.g. epochs=10")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
            raise UserError(f"seed={seed!r}: expected a whole number from 0 to {_LARGEST_SEED}")
        self.model, self.seed, self.progress = model, seed, progress
        self._epochs: list[Epoch] = []
        fields = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "device": device, **recipe}
        _require_fields(fields)
        if isinstance(train, PreparedDataset):
            if validation is not None:
                raise UserError("validation: leave it out with a prepared data set, which has its own")
            self._flip = bool(fields.pop("horizontal_flip", False))
            self.recipe = _recipe({"batch_size": _BATCH_SIZE, **fields})
            if (padding := self.recipe.crop_padding) >= train.image_size:
                raise UserError(f"crop_padding={padding}: must be less than {train.image_size}, the images' size")
            check_classes(model, train)
            self._data: PreparedDataset | Loaders = train
        else:
            _require_none_of_prepared(fields)
            self._flip = False
            self._data, batch_size = _checked_loaders(model, train, validation)
            self.recipe = _recipe({"batch_size": batch_size, **fields})
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError("model: all of its parameters are frozen; set requires_grad of those to be trained")
        build_optimizer(model, self.recipe)  # told before the first batch where it cannot be

    @property
    def history(self) -> "pd.DataFrame":
        """A row for each epoch that the latest `fit` has finished, in the columns of `Epoch`."""
        import pandas as pd

        table = pd.DataFrame([asdict(epoch) for epoch in self._epochs], columns=list(Epoch.__dataclass_fields__))
        validated = not (isinstance(self._data, Loaders) and self._data.validation is None)
        return table if validated else table.drop(columns=_VALIDATION)

    def fit(self) -> "pd.DataFrame":
        """Train for all epochs, and return the `history`.

        Afterwards the model has the weights of the epoch with the highest validation accuracy, or without validation
        the last ones, and is in eval mode. That is also so when training is interrupted, by Ctrl-C or by an error:
        `history` then has the epochs until there. The model keeps the data set's class names and normalisation as its
        ``trained_on``, for `save_model`, `evaluate` and `predict`.
        Called again, it trains the model on, from the top of the schedule.

        Raises:
            DivergedError: the loss is not finite.
            UserError: the device is not there, a batch is not what was expected, or memory does not suffice.
        """
        from rich.console import Console

        from effvit.training.run import Best

        console = Console(stderr=True, quiet=not self.progress)
        self._epochs = []
        with policy.kept():
            training: Training[nn.Module, Any] = Training(
                self.model,
                self._data,
                self.recipe,
                seed=self.seed,
                horizontal_flip=self._flip,
                report=lambda line: console.print(line, highlight=False, soft_wrap=True),
            )
            if training.place.world > 1:
                raise UserError("Trainer: works in one process; `effvit train` takes several devices")
            # Not every operation of any model has a deterministic form: where there is none, PyTorch warns.
            torch.use_deterministic_algorithms(self.recipe.deterministic, warn_only=True)
            best = Best()
            try:
                self._follow(training, best, console)
            finally:
                self.model.load_state_dict(best.weights or training.weights.state_dict())
                self.model.eval()
                for each in (self.model, unwrapped(self.model)):
                    each.trained_on = self._trained_on()  # type: ignore[assignment]
        return self.history

    def evaluate(self, data: PreparedDataset | DataLoader[Any]) -> dict[str, float]:
        """Score the model as it is by `effvit.evaluate`: on a data set's test split, or on what a loader gives."""
        return evaluate(self.model, data, batch_size=self.recipe.batch_size)

    def _trained_on(self) -> TrainedOn:
        if isinstance(self._data, Loaders):
            return TrainedOn()
        return TrainedOn(classes=self._data.classes, mean=self._data.mean, std=self._data.std)

    def _follow(self, training: Training[nn.Module, Any], best: "Best", console: Any) -> None:
        from effvit.training.run import epoch_line, progress_bar

        steps, epochs = training.steps_per_epoch, self.recipe.epochs
        with progress_bar(console) as bar:
            task = bar.add_task("training", total=epochs * steps, loss=float("nan"), accuracy=float("nan"))
            for event in training.run():
                if isinstance(event, Step):
                    bar.update(task, advance=1, loss=event.loss, accuracy=event.accuracy)
                    continue
                self._epochs.append(event)
                chosen = training.validates and best.offer(event, training.weights)
                console.print(epoch_line(event, epochs, chosen), highlight=False, soft_wrap=True)


def _require_fields(fields: dict[str, Any]) -> None:
    known = ["horizontal_flip", *(name for name in TrainConfig.model_fields if name not in _OF_RUNS)]
    for name in fields:
        if name in _OF_RUNS:
            raise UserError(f"{name}: of `effvit train`, which keeps its runs on disk; Trainer does not")
        if name not in known:
            raise UserError(f"{name}: unknown option, expected one of {', '.join(known)}{did_you_mean(name, known)}")


def _require_none_of_prepared(fields: dict[str, Any]) -> None:
    if given := [name for name in _OF_PREPARED if name in fields]:
        raise UserError(f"{', '.join(given)}: of prepared data sets; a DataLoader and its transforms have their own")


def _recipe(fields: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig(**fields)
    except ValidationError as error:
        raise UserError(explain(error)) from error


def _checked_loaders(
    model: nn.Module, train: DataLoader[Any], validation: DataLoader[Any] | None
) -> tuple[Loaders, int]:
    """The loaders, and the size of the first batch."""
    length_of(train, "train")
    images, _ = first_batch(train, "train")
    loaders = Loaders(train, validation, count_classes(model, images))
    if validation is not None:
        shown, _ = first_batch(validation, "validation")
        if shown.shape[1:] != images.shape[1:]:
            raise UserError(
                f"validation: images of shape {tuple(shown.shape[1:])}, those of train have {tuple(images.shape[1:])}"
            )
    return loaders, len(images)
