"""Shares that sum to one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from effvit.kernels.choice import one_step


@one_step  # or who looks for attention in a graph (timm's AttentionExtract) takes its softmax for it
def shares(logits: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return logits.softmax(dim=-1)


def weighted_sum(parts: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Sum of R tensors ``(B, H, P, e)``, made one after the other, by weights ``(B, P, R)``."""
    total, of_parts = None, weights[:, None, ..., None].unbind(dim=3)
    for number, part in enumerate(parts):  # torch.fx cannot go through what it traces
        weight = of_parts[number].to(part.dtype)
        total = weight * part if total is None else torch.addcmul(total, weight, part)
    assert total is not None, "no parts"
    return total
