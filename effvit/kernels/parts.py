"""Heads or tokens ``(B, H, N, d)`` cut and joined as they lie in memory, a token's heads side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor


def split(x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    """Cut along heads or tokens, so that gradients are put together as they lie."""
    parts = x.transpose(1, 2).split(sizes, dim=3 - dim)
    return [parts[i].transpose(1, 2) for i in range(len(sizes))]  # torch.fx cannot go through what it traces


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Put parts together along heads or tokens."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=3 - dim).transpose(1, 2)
