"""The calls whose cost is measured: inference and a training step of a model, passes of one attention block."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from effvit.measure.latency import Call
from effvit.model.vit import ViT

if TYPE_CHECKING:
    from effvit.measure.execution import Execution


def inference(model: ViT, batch_size: int, device: torch.device, how: "Execution | None" = None) -> Call:
    """Forward pass of ``batch_size`` random images; puts the model into eval mode."""
    model.eval()
    images = _images(model, batch_size, device)
    autocast = _autocast(how, device)

    @torch.inference_mode()
    def call() -> object:
        with autocast():
            return model(images)

    return call


def adamw(model: ViT) -> torch.optim.AdamW:
    """Return an optimiser whose learning rate is zero: it does all its work and leaves the weights where they are.

    Its moments are there already, so that the first step is like any other.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # as training has it
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    return optimiser


def training_step(
    model: ViT,
    optimiser: torch.optim.Optimizer,
    batch_size: int,
    device: torch.device,
    how: "Execution | None" = None,
) -> Call:
    """Forward, backward and optimiser step on ``batch_size`` random images; puts the model into training mode."""
    model.train()
    images = _images(model, batch_size, device)
    labels = torch.randint(model.config.num_classes, (batch_size,), device=device)

    autocast = _autocast(how, device)

    def call() -> None:
        with autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return call


def block_forward(block: nn.Module, tokens: torch.Tensor, how: "Execution | None" = None) -> Call:
    """Forward pass of a block on tokens ``(B, N, C)``; puts the block into eval mode."""
    block.eval()

    autocast = _autocast(how, tokens.device)

    @torch.inference_mode()
    def call() -> object:
        with autocast():
            return block(tokens)

    return call


def block_training(block: nn.Module, tokens: torch.Tensor, how: "Execution | None" = None) -> Call:
    """Forward and backward pass, down to the tokens as inside a model; puts the block into training mode."""
    block.train()
    tokens = tokens.detach().requires_grad_()
    gradient = torch.ones_like(tokens)
    autocast = _autocast(how, tokens.device)

    def call() -> None:
        with autocast():
            y = block(tokens)
        y.backward(gradient.to(y.dtype))
        block.zero_grad()
        tokens.grad = None

    return call


def _autocast(how: "Execution | None", device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    return nullcontext if how is None else partial(how.autocast, device)


def _images(model: ViT, batch_size: int, device: torch.device) -> torch.Tensor:
    config = model.config
    return torch.randn(batch_size, config.num_channels, *config.image_shape, device=device)
