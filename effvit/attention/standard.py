"""Scaled dot-product attention written out, with maps for each head: the readable reference.

Vaswani et al. 2017 (arXiv 1706.03762, eq. 1); in Vision Transformers Dosovitskiy et al. 2021 (arXiv 2010.11929,
appendix A).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import Attention, register
from effvit.kernels.choice import is_plain
from effvit.kernels.dispatch import qkv

_MAPS = ("query", "key", "value")


class Head(nn.Module):
    """The query, key and value maps of one head."""

    def __init__(self, dim: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.query = nn.Linear(dim, head_dim, bias=bias)
        self.key = nn.Linear(dim, head_dim, bias=bias)
        self.value = nn.Linear(dim, head_dim, bias=bias)


@register
class StandardAttention(Attention):
    """softmax(q kᵀ / √d) v with the N x N matrix in memory."""

    complexity = "O(N²)"
    paper = "Dosovitskiy et al. 2021, arXiv 2010.11929"
    exact = True

    def build_maps(self, qkv_bias: bool) -> None:
        self.heads = nn.ModuleList(Head(self.dim, self.head_dim, qkv_bias) for _ in range(self.num_heads))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = [[getattr(head, name) for head in self.heads] for name in _MAPS]
        if not all(is_plain(each) for of_heads in maps for each in of_heads):
            q, k, v = (torch.stack([each(x) for each in of_heads], dim=1) for of_heads in maps)
            return q, k, v
        # The heads' maps one below the other: the same products, as one.
        weight = torch.cat([each.weight for of_heads in maps for each in of_heads])
        biases = [each.bias for of_heads in maps for each in of_heads]
        q, k, v = qkv(x, weight, None if biases[0] is None else torch.cat(biases))
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
        probabilities = scores.softmax(dim=-1, dtype=scores.dtype)  # autocast would have it in float32, which v is not
        return F.dropout(probabilities, self.dropout_p) @ v

    def mixing_macs(self) -> int:
        """2N²C."""
        return 2 * self.num_tokens**2 * self.dim
