"""One training run on disk: the loop's epochs into a model directory and a log directory, whatever kills it."""

import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from effvit import policy
from effvit.data.loading.prepared import PreparedDataset
from effvit.device import this_machine
from effvit.files import check_replaceable, staged_dir, write_csv, write_json
from effvit.model.checkpoint import is_model_dir, save_model
from effvit.model.pretrained import StartReport, start_from
from effvit.model.vit import ViT, ViTConfig
from effvit.provenance import write_provenance
from effvit.training.interrupts import Request, noted_interrupts
from effvit.training.logger import Curves, check_logger, how_to_watch, open_curves
from effvit.training.loop import DivergedError, Epoch, Step, Training
from effvit.training.recipe import TrainConfig
from effvit.training.resume import Store, fingerprint, is_finished, open_store, record_finished

_HISTORY = "history.csv"
_LOGS = (_HISTORY, "timing.csv", "start.json", "provenance.json")
_MEASURED = ["seconds", "images_per_second", "peak_memory_mib"]
_OF_THE_MACHINE = {"checkpoint_s", "device", "devices", "micro_batch_size", "workers"}  # not of the recipe
_SHOWN_EVERY_S = 0.2


class Best:
    """The model of the epoch with the highest validation accuracy; of equals, the one with the lowest loss."""

    def __init__(self) -> None:
        self.epoch: Epoch | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def offer(self, epoch: Epoch, model: nn.Module) -> bool:
        """Keep a copy of the model's weights if it is the best so far; say whether it is."""
        if self.epoch is not None and self._rank(epoch) <= self._rank(self.epoch):
            return False
        self.epoch = epoch
        self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return True

    @staticmethod
    def _rank(epoch: Epoch) -> tuple[float, float]:
        return epoch.val_accuracy, -epoch.val_loss

    def save(self, training: Training, directory: Path) -> None:
        """Write the kept weights as a model directory."""
        assert self.epoch is not None
        model = ViT(training.model.config)
        model.load_state_dict(self.weights)
        _save(model, self.epoch, training, directory)


class Run:
    """A training with its record: the epochs so far and the best model.

    The leading process alone has ``store`` and ``curves``.
    """

    def __init__(
        self, training: Training[ViT, PreparedDataset], store: Store | None, curves: Curves | None, console: Console
    ) -> None:
        self.training, self.store, self.curves, self.console = training, store, curves, console
        self.history: list[Epoch] = []
        self.best = Best()
        self._saved = time.monotonic()

    @property
    def where(self) -> str:
        """What comes next."""
        step, steps = self.training.step + 1, self.training.steps_per_epoch
        return f"epoch {self.training.epoch + 1}, {'validation' if step > steps else f'step {step} of {steps}'}"

    def take(self, event: Step | Epoch) -> None:
        """Record what a step or an epoch came to, and save where it is time to."""
        recipe = self.training.recipe
        if isinstance(event, Epoch):
            self.history.append(event)
            chosen = self.best.offer(event, self.training.weights)
            self.console.print(epoch_line(event, recipe.epochs, chosen), highlight=False, soft_wrap=True)
            if self.curves:
                self.curves.log(event)
            if self.store and event.epoch in self.kept_epochs():
                with staged_dir(self.store.kept(event.epoch)) as kept:
                    _save(self.training.weights, event, self.training, kept)
            self.save()
        elif event.stop or time.monotonic() - self._saved >= recipe.checkpoint_s:
            self.save()

    def kept_epochs(self) -> range:
        """Epochs so far whose weights are kept for themselves."""
        every = self.training.recipe.save_every
        return range(every, len(self.history) + 1, every) if every else range(0)

    def save(self) -> None:
        """Save the run's state, so that it survives this process."""
        if self.store is None:
            return
        tensors, numbers = self.training.state()
        if not math.isfinite(numbers["loss_sum"]):
            return  # about to be reported: nothing to resume from
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.weights.items()}
        best = self.best.epoch.epoch if self.best.epoch else None
        history = [asdict(epoch) for epoch in self.history]
        self.store.save(tensors, {"training": numbers, "history": history, "best": best})
        self._saved = time.monotonic()

    def restore(self) -> None:
        """Resume from the state of an earlier process, if there is one."""
        saved = self.training.fabric.broadcast(self.store.load() if self.store else None)
        if saved is None:
            return
        tensors, numbers = saved
        self.training.restore(tensors, numbers["training"])
        self.history = [Epoch(**values) for values in numbers["history"]]
        if numbers["best"]:
            self.best.epoch = self.history[numbers["best"] - 1]
            self.best.weights = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        if self.curves:
            for epoch in self.history:
                self.curves.log(epoch)
        self.console.print(f"resuming at {self.where}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Before:
    """How a model that starts from trained weights does before anything is trained, its new parts fresh."""

    val_loss_before: float
    val_accuracy_before: float


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; ``macs`` are those of one image, ``seconds`` those of training alone."""

    best_epoch: int
    epochs: int
    val_accuracy: float
    parameters: int
    macs: int
    device: str
    seconds: float


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
    overwrite: bool = True,
    live_dir: Path | None = None,
) -> Summary | None:
    """Train, and write the best model to ``output_dir`` and the log to ``log_dir``.

    With ``init_from`` the model starts from those weights, and the log says what became of each (``start.json``).
    A run that was killed resumes where it was saved last, and ends with the bytes that it would have had anyway. If
    training diverges, the best model so far is left in ``<output_dir>.diverged`` and nothing else is written. Without
    ``overwrite``, a run that has already written both directories is not trained again. Curves that can be watched
    while it trains go to ``live_dir``, by default ``<log_dir>-live``.

    Returns:
        What it came to; None if there was nothing to do, and in processes other than the leading one.

    Raises:
        DivergedError: the loss is not finite.
        UserError: ``init_from`` has no weights that fit, or the package of the logger is missing.
        SystemExit: after SIGINT or SIGTERM, with status 130 or 143, when the run has been saved. After the last step
            there is none: the run is written in full.
    """
    check_replaceable(output_dir, is_model_dir)
    check_replaceable(log_dir, _LOGS)
    check_logger(recipe.logger)
    console = Console(stderr=True)
    report = partial(console.print, highlight=False, soft_wrap=True)
    start: StartReport | None = None

    def init(model: ViT) -> None:
        nonlocal start
        start = start_from(init_from, model) if init_from else None

    with ExitStack() as stack:
        stack.enter_context(policy.kept())
        request = stack.enter_context(noted_interrupts())
        training = Training(
            config,
            dataset,
            recipe,
            seed=seed,
            horizontal_flip=horizontal_flip,
            init=init,
            report=report,
            should_stop=lambda: request.number is not None,
        )
        leads = training.fabric.is_global_zero
        store = name = None
        if leads:
            weights = start.sha256 if start else None
            machine = this_machine(training.place.device)
            name = fingerprint(
                config, dataset, training.recipe, machine, seed=seed, horizontal_flip=horizontal_flip, start=weights
            )
        console.quiet = not leads
        finished = name is not None and not overwrite and is_finished(name, output_dir, log_dir)
        if training.fabric.broadcast(finished):
            report(f"{output_dir}: already trained with these settings, nothing to do (--overwrite trains it again)")
            return None
        curves = None
        if name is not None:
            store = stack.enter_context(open_store(name, report))
            live = (live_dir or log_dir.with_name(f"{log_dir.name}-live")) / recipe.logger
            curves = open_curves(recipe.logger, live)
            if curves:
                stack.callback(curves.close)
                report(how_to_watch(recipe.logger, live))
        before = None
        if start:
            before = Before(*training.validate())
            lines = [*start.lines(), f"  validation accuracy before training: {before.val_accuracy_before:.1%}"]
            console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        run = Run(training, store, curves, console)
        run.restore()
        try:
            _follow(run, request)
        except DivergedError:
            if store:
                _rescue(run.best, training, output_dir)
                store.remove()  # it would only diverge again
            training.fabric.barrier()
            if not leads:
                raise SystemExit(1) from None  # the leading one reports it
            raise
        if store:
            _write(run, store, (start, before) if start and before else None, output_dir, log_dir)
            store.remove()
        if name is not None:
            record_finished(name, output_dir, log_dir)
        training.fabric.barrier()
        return _summary(run) if leads else None


def _summary(run: Run) -> Summary:
    best, model = run.best.epoch, run.training.model
    assert best is not None
    return Summary(
        best_epoch=best.epoch,
        epochs=len(run.history),
        val_accuracy=best.val_accuracy,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=model.macs(),
        device=str(run.training.place.device.type),
        seconds=sum(epoch.seconds for epoch in run.history),
    )


def _follow(run: Run, request: Request) -> None:
    """Train to the end, or until all processes stop because one was asked to.

    They stop after a step, where they agree on it: asked to during a validation, after the first step that follows. The
    last validation has none after it: the run is complete, and ends as if it had not been asked.
    """
    training, shown = run.training, 0.0
    total = training.recipe.epochs * training.dataset.counts["train"]
    with progress_bar(run.console) as progress:
        task = progress.add_task(training.model.config.attention, total=total, loss=math.nan, accuracy=math.nan)
        for event in training.run():
            run.take(event)
            if isinstance(event, Epoch):
                continue
            if event.stop:
                break
            if time.monotonic() - shown > _SHOWN_EVERY_S:
                shown = time.monotonic()
                progress.update(task, completed=training.images_seen, loss=event.loss, accuracy=event.accuracy)
        else:
            return
    training.fabric.barrier()  # none ends before the state is written
    run.console.print(f"stopped at {run.where}: the same command resumes there", highlight=False, soft_wrap=True)
    raise SystemExit(request.status)


def _rescue(best: Best, training: Training, output_dir: Path) -> None:
    if best.epoch is not None:
        with staged_dir(output_dir.with_name(f"{output_dir.name}.diverged"), is_model_dir) as rescued:
            best.save(training, rescued)


def _save(model: ViT, epoch: Epoch, training: Training, directory: Path) -> None:
    """Write a model with what it was trained on, how, and the accuracy that it had after an epoch."""
    dataset = training.dataset
    save_model(
        model,
        directory,
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        dataset=dataset.name,
        accuracy={"validation": epoch.val_accuracy},
        recipe=training.recipe.model_dump(exclude=_OF_THE_MACHINE) | {"seed": training.seed, "epoch": epoch.epoch},
    )


def _write(run: Run, store: Store, start: tuple[StartReport, Before] | None, output_dir: Path, log_dir: Path) -> None:
    training, config = run.training, run.training.model.config
    with staged_dir(output_dir, is_model_dir) as model_dir, staged_dir(log_dir, _LOGS) as logs:
        run.best.save(training, model_dir)
        for epoch in run.kept_epochs():
            shutil.copytree(store.kept(epoch), model_dir / store.kept(epoch).name)
        table = pd.DataFrame([asdict(epoch) for epoch in run.history])
        write_csv(logs / _HISTORY, table.drop(columns=_MEASURED))
        write_csv(logs / "timing.csv", table[["epoch", *_MEASURED]].round(3))
        settings: dict[str, Any] = {"model": config.model_dump(), "train": training.recipe.model_dump()}
        if start:
            loaded, before = start
            write_json(logs / "start.json", asdict(loaded) | asdict(before))
            settings["start"] = {"from": loaded.source, "sha256": loaded.sha256}
        write_provenance(
            logs,
            {**settings, "dataset": training.dataset.name, "seed": training.seed, "processes": training.place.world},
            this_machine(training.place.device),
        )


def progress_bar(console: Console) -> Progress:
    """A bar that vanishes when it is through; its tasks have fields ``loss`` and ``accuracy``."""
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


def epoch_line(epoch: Epoch, epochs: int, best: bool) -> str:
    """One line on an epoch of so many; a star marks the best so far."""
    validation = ""
    if not math.isnan(epoch.val_loss):
        validation = f"validation {epoch.val_loss:.3f} {epoch.val_accuracy:.1%}{' *' if best else '  '}  "
    return (
        f"epoch {epoch.epoch:>3}/{epochs}  loss {epoch.train_loss:.3f}  accuracy {epoch.train_accuracy:.1%}  "
        f"{validation}{epoch.images_per_second:,.0f} images/s"
    )
