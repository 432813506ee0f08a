"""Focused linear attention: features as powers, which turn queries and keys to their nearest axes.

Han et al. 2023, FLatten Transformer (arXiv 2308.00442, eq. 5 and 6). The published code takes norms over the channels
of all heads; here they are of each head's d, as in the equations. Its convolution is the model's ``value_conv: 5``.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.kernels.dispatch import feature_attention
from effvit.kernels.feature_attention import Features


class FocusedOptions(AttentionOptions):
    """The power p of the features."""

    power: float = Field(3.0, gt=0, le=16)


@register
class FocusedAttention(Attention):
    """φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) with φ(x) = ‖x̂‖ x̂ᵖ / ‖x̂ᵖ‖ and x̂ = (relu(x) + ε) / softplus(scale).

    Dropout acts on φ(q).
    """

    Options = FocusedOptions
    complexity = "O(N d)"
    paper = "Han et al. 2023, arXiv 2308.00442"
    options: FocusedOptions

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: FocusedOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.scale = nn.Parameter(torch.zeros(dim))  # as published: softplus(0) = ln 2 for every channel

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        scale = F.softplus(self.scale).unflatten(0, (self.num_heads, 1, self.head_dim))
        return feature_attention(q, k, v, Features("focused", 0.0, None, scale, self.options.power), self.dropout_p)

    def mixing_macs(self) -> int:
        """2NCd, and NC for the normaliser."""
        return self.num_tokens * self.dim * (2 * self.head_dim + 1)
