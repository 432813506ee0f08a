"""The same attention as ``standard``, with one merged map and no N x N matrix in memory.

Dao et al. 2022 (arXiv 2205.14135) as PyTorch's ``scaled_dot_product_attention``. The parameters are named and laid
out as in timm's ``Attention``: ``qkv.weight`` (3C, C) with rows q, k, v, each head after head, and ``proj``.
"""

from torch import Tensor

from effvit.attention.base import Attention, register
from effvit.kernels.dispatch import softmax_attention


@register
class FusedAttention(Attention):
    """softmax(q kᵀ / √d) v, block by block."""

    complexity = "O(N²), memory O(N)"
    paper = "Dao et al. 2022, arXiv 2205.14135"
    exact = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        return softmax_attention(q, k, v, self.dropout_p)

    def mixing_macs(self) -> int:
        """2N²C."""
        return 2 * self.num_tokens**2 * self.dim
