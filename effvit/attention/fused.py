"""The same attention as ``standard``, with one merged map and no N x N matrix in memory but for short sequences.

Dao et al. 2022 (arXiv 2205.14135) as PyTorch's ``scaled_dot_product_attention``. The parameters are named and laid
out as in timm's ``Attention``: ``qkv.weight`` (3C, C) with rows q, k, v, each head after head, and ``proj``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effvit.attention.base import Attention, register

_SHORT_TOKENS, _NARROW_HEAD = 128, 16  # up to which products over whole matrices train faster on a CPU


@register
class FusedAttention(Attention):
    """softmax(q kᵀ / √d) v, block by block."""

    complexity = "O(N²), memory O(N)"
    paper = "Dao et al. 2022, arXiv 2205.14135"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        if self.dropout_p == 0 and suits_short(q):
            return ShortAttention.apply(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)

    def mixing_macs(self) -> int:
        """2N²C."""
        return 2 * self.num_tokens**2 * self.dim


def suits_short(q: Tensor) -> bool:
    """Whether to train on queries ``(B, H, N, d)`` by ``ShortAttention``: few tokens, narrow heads, eager, on a CPU."""
    small = q.shape[-2] <= _SHORT_TOKENS and q.shape[-1] <= _NARROW_HEAD
    eager = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    plain = eager and not torch._C._are_functorch_transforms_active()
    return small and plain and q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad


class ShortAttention(torch.autograd.Function):
    """y = P v with P = softmax(S), S = q kᵀ / √d, one head of the whole batch at a time; P is kept for the way back.

    At 65 tokens and heads of 12, the block-by-block kernel spends its time on products of 32 x 65 x 12 numbers. Here
    every product with d columns is computed as its transpose, yᵀ = vᵀ Pᵀ, so that its vectors run along N tokens.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (b, heads, n, d), y = q.shape, _like_tokens(v)
        kept = q.new_empty(heads, b, n, n)
        for h, p in enumerate(kept):
            torch.baddbmm(p, q[:, h], k[:, h].mT, beta=0, alpha=d**-0.5, out=p)
            torch.softmax(p, dim=-1, out=p)
            y[:, h] = torch.bmm(v[:, h].mT, p.mT).mT
        ctx.save_for_backward(q, k, v, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, kept = ctx.saved_tensors
        d_q, d_k, d_v = (_like_tokens(tokens) for tokens in (q, k, v))
        d_s = torch.empty_like(kept[0])
        for h, p in enumerate(kept):
            d_y = gradient[:, h]
            d_v[:, h] = torch.bmm(d_y.mT, p).mT
            torch.baddbmm(d_s, d_y, v[:, h].mT, beta=0, alpha=q.shape[-1] ** -0.5, out=d_s)  # ∂P / √d
            # ∂S = P ∘ (∂P - rowsum(P ∘ ∂P)), in place
            torch.ops.aten._softmax_backward_data.out(d_s, p, -1, p.dtype, grad_input=d_s)
            d_q[:, h] = torch.bmm(k[:, h].mT, d_s.mT).mT
            d_k[:, h] = torch.bmm(q[:, h].mT, d_s).mT
        return d_q, d_k, d_v


def _like_tokens(x: Tensor) -> Tensor:
    """Memory for ``(B, H, N, d)`` in which a token's heads lie side by side."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
