"""A running mean of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """W̄ ← d W̄ + (1 - d) W after each step, from the first step's W on; buffers are the model's own.

    As PyTorch's `AveragedModel`, whose count of steps is on the device, where the host waits to read it.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step number ``step``, from 1."""
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if step == 1:
            torch._foreach_copy_(mine, theirs)
        else:
            torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for own, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
