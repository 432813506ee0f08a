"""The training loop: one recipe for every mechanism, on whatever devices Lightning Fabric finds.

What is random in a step derives from (seed, epoch, step) alone (see `effvit.seeding`), so that a run can stop after any
step and resume from its `state` with the same numbers, and so that processes agree without talking about it.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from effvit import policy
from effvit.attention import Attention
from effvit.data.loading.batches import Batch, steps_of, training_batches, validation_batches
from effvit.data.loading.loaders import Loaders
from effvit.data.loading.prepared import PreparedDataset
from effvit.device import pick_device
from effvit.errors import UserError
from effvit.memory import is_out_of_memory, peak_resident_bytes
from effvit.model.logits import logits_of
from effvit.model.vit import ViT, ViTConfig
from effvit.seeding import Purpose, derive, torch_generator
from effvit.training.allocator import keep_freed_memory
from effvit.training.average import Average
from effvit.training.compiling import compile_blocks
from effvit.training.optimizer import build_optimizer, clip_gradients, schedule
from effvit.training.parallel import Exchange, make_fabric, process_place
from effvit.training.recipe import TrainConfig

M = TypeVar("M", bound=nn.Module)
D = TypeVar("D", bound=PreparedDataset | Loaders)


class DivergedError(UserError):
    """The loss stopped being a finite number."""


@dataclass(frozen=True)
class Step:
    """What one step came to, over all processes; ``stop`` where one of them was asked to stop."""

    images: int
    loss: float
    accuracy: float
    stop: bool


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. Losses in nats, accuracies as fractions, ``lr`` of its last step, time of training.

    Where images are mixed, the class with the larger share is the right one. Memory is the process's peak so far: of
    CUDA's allocator, or on a CPU resident. Without validation its loss and accuracy are NaN.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    images_per_second: float
    peak_memory_mib: float


class Training(Generic[M, D]):
    """A run as far as it has come. Same arguments, same numbers on the same machine, whether it is continued or not.

    It sets PyTorch up by `effvit.policy.apply`, for which a caller who wants its own settings back has `policy.kept`.

    Args:
        model: configuration of a ViT to build, or an image classifier, which is trained in place.
        dataset: prepared images, of which the test split is not read; or loaders.
        recipe: optimiser, schedule, augmentation, devices.
        seed: of weights, data order, augmentation and random features.
        horizontal_flip: whether mirrored images are still of their class; loaders mirror their own.
        init: called with the model, to change the weights that it starts from.
        report: called with one line when a setting is adjusted.
        should_stop: asked in each step whether all processes shall stop after it.

    Raises:
        UserError: the device is not there, or one image does not fit its memory.
    """

    def __init__(
        self,
        model: ViTConfig | M,
        dataset: D,
        recipe: TrainConfig,
        *,
        seed: int,
        horizontal_flip: bool,
        init: Callable[[M], object] = lambda model: None,
        report: Callable[[str], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        given, recipe = recipe, recipe.with_warmup_that_fits()
        self.dataset, self.seed = dataset, seed
        self.augmentation = recipe.augmentation(horizontal_flip)
        self._report, self._should_stop = report, should_stop
        keep_freed_memory()
        # Before Fabric, which reads what it sets.
        policy.apply(pick_device(recipe.device), deterministic=recipe.deterministic, threads=recipe.threads)
        self.fabric: Fabric = make_fabric(recipe.device, recipe.devices, recipe.precision)
        precision = policy.training_precision(recipe.precision, self.fabric.device)
        self.recipe = recipe = recipe.model_copy(update={"precision": precision})
        self.place = process_place(self.fabric)
        if recipe.warmup_epochs != given.warmup_epochs and self.fabric.is_global_zero:
            report(
                f"warmup_epochs={given.warmup_epochs:g} is not less than epochs={recipe.epochs}: "
                f"warm-up shortened to {recipe.warmup_epochs:g} epochs"
            )
        seed_everything(seed, verbose=False)
        self.model = cast(M, ViT(model)) if isinstance(model, ViTConfig) else model
        init(self.model)
        self.optimizer = build_optimizer(self.model, recipe)
        self._forward, self._update = self.fabric.setup(self.model, self.optimizer)
        self._graphs = recipe.compile == "graphs"
        self._exchange = Exchange(self.fabric, self.model.parameters(), stay=self._graphs)
        self._averaged = Average(self.model, recipe.ema_decay) if recipe.ema_decay else None
        for module in dict.fromkeys((self.model, self.weights)):
            compile_blocks(module, recipe.compile, self.place.device)
        compiled = recipe.compile != "off" and self.place.device.type == "cuda"
        self._fills_up = compiled and not any(isinstance(module, _OF_THE_BATCH) for module in self.model.modules())
        self._most_images = self._usual_images(recipe.batch_size)  # at once
        self._attentions = [module for module in self.model.modules() if isinstance(module, Attention)]
        self._pending: deque[tuple[_Figures, int, int]] = deque()  # figures, images and number of steps done
        self._settled: list[tuple[Step, int]] = []  # of those that have been read
        self.steps_per_epoch = (
            dataset.steps if isinstance(dataset, Loaders) else steps_of(dataset.counts["train"], recipe.batch_size)
        )
        self.micro_batch_size = recipe.micro_batch_size  # 0 for as many as a step has
        self.epoch = self.step = 0  # epochs that are over, steps of the one after them
        self.loss_sum = self.right = self.seconds = 0.0  # of those steps

    def _usual_images(self, batch_size: int) -> int:
        """Images of this process in a batch that is not the last; loaders show theirs later."""
        if isinstance(self.dataset, Loaders):
            return 0
        part = self.place.share(min(batch_size, self.dataset.counts["train"]))
        return int(part.stop - part.start)

    @property
    def weights(self) -> M:
        """The weights that count: the averaged ones where the recipe averages. Not to be changed."""
        return self.model if self._averaged is None else self._averaged.module

    @property
    def validates(self) -> bool:
        """Whether there are images for validation."""
        return not (isinstance(self.dataset, Loaders) and self.dataset.validation is None)

    @property
    def images_seen(self) -> int:
        """Images of a prepared data set trained on since the first epoch, each as often as it was."""
        count = self.dataset.counts["train"]
        return self.epoch * count + min(self.step * self.recipe.batch_size, count)

    def run(self) -> Iterator[Step | Epoch]:
        """Train to the end of the recipe, giving what each step and each epoch came to.

        Raises:
            DivergedError: the loss is not finite; names epoch, step and learning rate.
        """
        while self.epoch < self.recipe.epochs:
            yield from self._steps()
            yield self._end_epoch()

    def _steps(self) -> Iterator[Step]:
        self.model.train()
        started = time.perf_counter()
        for batch in self._training_batches():
            lr = self._lr(self.step)
            self._pending.append((self._take_step(batch, lr), batch.total, self.step))
            self.step += 1
            last = self.step == self.steps_per_epoch
            # A CUDA device is left with a step to do while the results of the one before it are read.
            self._settle(keep=1 if self.place.device.type == "cuda" and not last else 0)
            settled, self._settled = self._settled, []
            self.seconds += time.perf_counter() - started
            started = time.perf_counter()
            for event, step in settled:
                self._require_finite(event.loss, "loss", step)
                yield event

    def _training_batches(self) -> Iterator[Batch]:
        if isinstance(self.dataset, Loaders):
            return self.dataset.training_batches(self.place, seed=self.seed, epoch=self.epoch)
        return training_batches(
            self.dataset,
            self.augmentation,
            self.place,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            start=self.step,
            workers=self.recipe.workers,
        )

    def _validation_batches(self) -> Iterator[Batch]:
        if isinstance(self.dataset, Loaders):
            return self.dataset.validation_batches(self.place)
        return validation_batches(
            self.dataset, self.place, batch_size=self.recipe.batch_size, workers=self.recipe.workers
        )

    def _lr(self, step: int) -> float:
        done = self.epoch * self.steps_per_epoch + step
        return self.recipe.lr * schedule(done, self.steps_per_epoch, self.recipe)

    def _take_step(self, batch: Batch, lr: float) -> "_Figures":
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        figures = self._exchange.sum(self._gradient(batch))
        if self.recipe.clip_norm:
            clip_gradients(self.fabric, self.optimizer, self.recipe.clip_norm)
        self._update.step()
        self._exchange.clear(self.optimizer)
        done = self.epoch * self.steps_per_epoch + self.step + 1
        generator = torch_generator(self.seed, Purpose.REDRAW, done)
        for attention in self._attentions:
            attention.after_step(done, generator, self.recipe.epochs * self.steps_per_epoch)
        if self._averaged is not None:
            self._averaged.update(self.model, done)
        return _Figures(figures)

    def _gradient(self, batch: Batch) -> Tensor:
        """Leave this process's part of the gradient; with less at a time where memory runs out."""
        while True:
            size = min(self.micro_batch_size or batch.total, max(1, len(batch.images)))
            try:
                return self._accumulate(batch, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError("out of memory with one image at a time: take a smaller model") from error
            self._exchange.clear(self.optimizer)
            if self.place.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch_size = -(-size // 2)
            self._report(
                f"out of memory with {size} images at a time: retrying with {self.micro_batch_size} "
                f"(micro_batch_size={self.micro_batch_size} skips the failed attempt; "
                f"the batch stays {self.recipe.batch_size})"
            )

    def _accumulate(self, batch: Batch, size: int) -> Tensor:
        """Add up the gradient of the batch's mean loss, ``size`` images at a time.

        Returns:
            Sum of losses, number of right answers, and whether to stop: ``(3,)``.
        """
        torch.manual_seed(derive(self.seed, Purpose.DROPOUT, self.epoch, self.step, self.place.rank))
        figures = torch.zeros(3, device=self.place.device)
        for images, targets in zip(batch.images.split(size), batch.targets.split(size), strict=True):
            if not len(images):
                continue  # a share of nothing
            logits = self._logits(self._forward, images)
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.recipe.label_smoothing)
            self.fabric.backward(loss / batch.total)
            figures[:2] += torch.stack([loss.detach(), _right(logits, targets)])
        figures[2].fill_(self._should_stop())
        return figures

    def _logits(self, forward: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Logits in float32. Where shapes are compiled for CUDA, a last, small batch is filled up with black images."""
        if self._graphs:  # all blocks belong to one pass, whose results the next may overwrite
            torch.compiler.cudagraph_mark_step_begin()
        if not self._fills_up:
            return logits_of(forward(images)).float()
        self._most_images = max(self._most_images, len(images))
        missing = min(self._most_images, self.micro_batch_size or self._most_images) - len(images)
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing > 0 else images
        return logits_of(forward(filled)).float()[: len(images)]

    def _settle(self, keep: int = 0) -> None:
        """Read the results of all steps but the latest ``keep``, and add them to the epoch's sums."""
        while len(self._pending) > keep:
            figures, images, step = self._pending.popleft()
            loss_sum, right, stop = figures.read()
            self.loss_sum += loss_sum
            self.right += right
            self._settled.append((Step(images, loss_sum / images, right / images, stop > 0), step))

    def _end_epoch(self) -> Epoch:
        val_loss, val_accuracy = self.validate() if self.validates else (math.nan, math.nan)
        if self.validates:
            self._require_finite(val_loss, "validation loss", self.steps_per_epoch - 1)
        count = self.dataset.counts["train"]
        done = Epoch(
            epoch=self.epoch + 1,
            lr=self._lr(self.steps_per_epoch - 1),
            train_loss=self.loss_sum / count,
            train_accuracy=self.right / count,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            seconds=self.seconds,
            images_per_second=count / self.seconds,
            peak_memory_mib=self._peak_bytes() / 2**20,
        )
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum = self.right = self.seconds = 0.0
        return done

    @torch.inference_mode()
    def validate(self) -> tuple[float, float]:
        """Loss and accuracy of the validation part, each image counted once whatever the number of processes."""
        self.weights.eval()
        rows = []
        with self.fabric.autocast():
            for batch in self._validation_batches():
                size = self.micro_batch_size or batch.total
                for images, labels in zip(batch.images.split(size), batch.targets.split(size), strict=True):
                    if len(images):
                        logits = self._logits(self.weights, images)
                        loss = F.cross_entropy(logits, labels, reduction="sum")
                        rows.append(torch.stack([loss, _right(logits, labels)]))
        sums = torch.zeros(2, dtype=torch.float64)
        for row in torch.stack(rows).cpu() if rows else ():  # one by one: MPS has no float64
            sums += row
        if self.place.world > 1:
            sums = self.fabric.all_reduce(sums.to(self.place.device), reduce_op="sum").cpu()  # type: ignore[union-attr]
        loss_sum, right = sums.tolist()
        return loss_sum / self.dataset.counts["validation"], right / self.dataset.counts["validation"]

    def _require_finite(self, loss: float, what: str, step: int) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"{what} became {loss} at epoch {self.epoch + 1}, step {step + 1} of {self.steps_per_epoch}, "
                f"learning rate {self._lr(step):.3g}: lower train.lr or lengthen train.warmup_epochs"
            )

    def _peak_bytes(self) -> int:
        device = self.place.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that `restore` needs to resume here: copies of tensors on the CPU, and numbers for JSON."""
        self._settle()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        if self._averaged is not None:
            tensors |= {f"averaged.{name}": tensor for name, tensor in self._averaged.module.state_dict().items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        numbers["precision"] = self.fabric.strategy.precision.state_dict()  # float16's loss scale
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Resume where `state` was taken in a run with the same arguments."""
        self.model.load_state_dict(_part(tensors, "model."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self._averaged is not None:
            self._averaged.module.load_state_dict(_part(tensors, "averaged."))
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.fabric.strategy.precision.load_state_dict(numbers["precision"])


_OF_THE_BATCH = nn.modules.batchnorm._NormBase  # layers in which a sample depends on its batch
_NUMBERS = ("epoch", "step", "loss_sum", "right", "seconds", "micro_batch_size")


class _Figures:
    """A few numbers on their way from a device, which need not be waited for until they are read."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived:
            self._arrived.synchronize()
        return self._values.tolist()


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
    return (logits.argmax(dim=1) == labels).sum()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
