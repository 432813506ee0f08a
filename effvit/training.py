"""The fit loop: one recipe for every mechanism, on whatever device Lightning Fabric finds."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.allocator import keep_freed_memory
from effvit.config import TrainConfig
from effvit.data.prepared import Images, PreparedDataset
from effvit.data.transforms import random_crop, random_horizontal_flip, to_float
from effvit.errors import UserError
from effvit.evaluation import predict_logits, top_k_accuracy
from effvit.vit import ViT, ViTConfig


class DivergedError(UserError):
    """The loss stopped being a finite number."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. Losses in nats, accuracies as fractions, ``lr`` of its last step, time of training."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    images_per_second: float


def make_fabric(device: str) -> Fabric:
    """Return Fabric on one ``auto``, ``cpu``, ``cuda`` or ``mps`` device; raises ``UserError`` where there is none."""
    # cuBLAS is deterministic only with a workspace of fixed size, set before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        return Fabric(accelerator=device, devices=1)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"device={device}: not usable here, try auto or cpu ({error})") from error


def fit(
    config: ViTConfig,
    dataset: PreparedDataset,
    recipe: TrainConfig,
    *,
    seed: int,
    horizontal_flip: bool,
    on_step: Callable[[int, float, float], None] = lambda images, loss, accuracy: None,
    init: Callable[[ViT], object] = lambda model: None,
) -> Iterator[tuple[Epoch, ViT]]:
    """Train a new model, yielding after each epoch what it came to and the model as it stands, in eval mode.

    The same arguments give the same numbers on the same machine. The caller must not change the model.

    Args:
        config: model to build and train.
        dataset: prepared images; the test split is not read.
        recipe: optimiser, schedule and augmentation.
        seed: of weights, data order, augmentation and random features.
        horizontal_flip: whether mirrored images are still of their class.
        on_step: called after each step with its number of images, loss and accuracy.
        init: called with the freshly built model, to change the weights that it starts from.

    Raises:
        DivergedError: the loss is not finite; names epoch, step and learning rate.
    """
    keep_freed_memory()
    fabric = make_fabric(recipe.device)
    seed_everything(seed, verbose=False)
    torch.use_deterministic_algorithms(True)
    # Every buffer here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    model = ViT(config)
    init(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr, fused=True)
    forward, optimizer = fabric.setup(model, optimizer)
    images, labels_array = dataset.split("train")
    labels = torch.from_numpy(labels_array)
    val_images, val_labels = dataset.split("validation")
    steps_per_epoch = math.ceil(len(labels) / recipe.batch_size)
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        started = time.perf_counter()
        total_loss = total_right = 0.0
        for rows in torch.randperm(len(labels), generator=generator).split(recipe.batch_size):
            lr = recipe.lr * schedule(step, steps_per_epoch, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = augmented(images, rows, dataset, recipe.crop_padding, horizontal_flip, fabric.device, generator)
            target = labels[rows].to(fabric.device)
            logits = forward(batch)
            loss = F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
            where = f"epoch {epoch}, step {step % steps_per_epoch + 1} of {steps_per_epoch}, learning rate {lr:.3g}"
            _require_finite(loss, "loss", where)
            fabric.backward(loss)
            if recipe.clip_norm:
                fabric.clip_gradients(forward, optimizer, max_norm=recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            for attention in model.attentions():
                attention.after_step(step, generator)
            right = (logits.argmax(dim=1) == target).sum().item()
            total_loss += loss.item() * len(rows)
            total_right += right
            on_step(len(rows), loss.item(), right / len(rows))
        seconds = time.perf_counter() - started
        model.eval()
        val_logits = predict_logits(model, val_images, dataset.mean, dataset.std, recipe.batch_size)
        val_loss = F.cross_entropy(val_logits, torch.from_numpy(val_labels))
        _require_finite(val_loss, "validation loss", where)
        record = Epoch(
            epoch=epoch,
            lr=lr,
            train_loss=total_loss / len(labels),
            train_accuracy=total_right / len(labels),
            val_loss=val_loss.item(),
            val_accuracy=top_k_accuracy(val_logits, torch.from_numpy(val_labels), 1),
            seconds=seconds,
            images_per_second=len(labels) / seconds,
        )
        yield record, model


def _require_finite(loss: Tensor, what: str, where: str) -> None:
    if not loss.isfinite():
        raise DivergedError(f"{what} became {loss.item()} at {where}: lower train.lr or lengthen train.warmup_epochs")


def augmented(
    images: Images,
    rows: Tensor,
    dataset: PreparedDataset,
    crop_padding: int,
    horizontal_flip: bool,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """Images of the given rows, cropped and flipped at random, normalised: ``(B, 3, H, W)`` on the device."""
    batch = torch.from_numpy(images[rows.numpy()]).to(device)  # uint8 (B, H, W, 3)
    if crop_padding:
        batch = random_crop(batch, crop_padding, generator)
    if horizontal_flip:
        batch = random_horizontal_flip(batch, generator)
    return to_float(batch, dataset.mean, dataset.std)


def schedule(step: int, steps_per_epoch: int, recipe: TrainConfig) -> float:
    """Factor of the learning rate at a step (from 0): linear warm-up, then half a cosine down to zero."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    total = recipe.epochs * steps_per_epoch
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameters with and without weight decay: none on biases, norms, position and class token."""
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and name not in ("pos_embed", "cls_token")
        (decayed if matrix else exempt).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
