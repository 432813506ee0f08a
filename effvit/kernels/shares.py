"""Shares that sum to one."""

from torch import Tensor

from effvit.kernels.choice import primitive


@primitive  # or who looks for attention in a graph (timm's AttentionExtract) takes its softmax for it
def shares(logits: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return logits.softmax(dim=-1)
