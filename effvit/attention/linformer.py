"""Linformer: keys and values of N tokens projected to k rows.

Wang et al. 2020 (arXiv 2006.04768, eq. 7).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.errors import UserError
from effvit.kernels.dispatch import softmax_attention, token_projection
from effvit.kernels.layers import apply_qkv_apart, apply_v, qkv_bias


class LinformerOptions(AttentionOptions):
    """k rows; E, F shared by: none (per head), heads (E ≠ F), kv (E = F), layers (one E for the whole model)."""

    k: int = Field(32, ge=1)
    share: Literal["none", "heads", "kv", "layers"] = "heads"

    def check_grid(self, grid_size: Grid, prefix_tokens: int = 1) -> None:
        tokens = prefix_tokens + grid_size[0] * grid_size[1]
        if self.k > tokens:
            raise UserError(f"attention.linformer.k={self.k}: must be at most {tokens}, the number of tokens")


@register
class LinformerAttention(Attention):
    """softmax(q k'ᵀ / √d) v' with k' = (E x) W_k and v' = (F x) W_v; E, F of shape (k, N).

    Dropout acts on the softmax over the k rows.
    """

    Options = LinformerOptions
    complexity = "O(N k)"
    paper = "Wang et al. 2020, arXiv 2006.04768"
    fixed_length = True

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: LinformerOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.k, self.share = options.k, options.share
        heads = (num_heads,) if self.share == "none" else ()
        # A row of E x is then a sum of N unit-scale tokens scaled back to unit scale.
        shape, std = (*heads, self.k, self.num_tokens), self.num_tokens**-0.5
        self.E = nn.Parameter(torch.randn(shape) * std)
        self.F = self.E if self.share in ("kv", "layers") else nn.Parameter(torch.randn(shape) * std)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.share == "none":
            # Each head has its own E: mixing d columns after the map is cheaper than C columns before it. As the bias
            # is to be added once a row, E (x W + b) is lacking (1 - E 1) b.
            _, b_k, b_v = (bias.view(self.num_heads, 1, self.head_dim) for bias in qkv_bias(self.qkv, x))
            q, k, v = super().project(x)
            k = self.E @ k + (1 - self.E.sum(dim=-1, keepdim=True)) * b_k
            return q, k, self.F @ v + (1 - self.F.sum(dim=-1, keepdim=True)) * b_v
        # E (x W) = (E x) W: projecting tokens first applies the maps to k rows instead of N. The bias is added
        # after the projection, once a row.
        q, k, v = apply_qkv_apart(self.qkv, x, self.project_tokens)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def project_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, N, C)`` to E x and F x, ``(B, k, C)``."""
        if self.F is self.E:
            (ex,) = token_projection(x, self.E)
            return ex, ex
        ex, fx = token_projection(x, self.E, self.F)
        return ex, fx

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        return softmax_attention(q, k, v, self.dropout_p)

    def patch_values(self, x: Tensor, v: Tensor) -> Tensor:
        return apply_v(self.qkv, x[:, self.prefix_tokens :])

    def map_values(self, v: Tensor) -> Tensor:
        """F itself: softmax(q k'ᵀ / √d) F is the matrix that is applied to x W_v."""
        return self.F.to(v.dtype).expand(*v.shape[:2], -1, -1)

    def map_macs(self) -> int:
        """NC² for the queries, NC² for the output, 2kC² for keys and values (2NC² with ``share=none``)."""
        rows = self.num_tokens if self.share == "none" else self.k
        return 2 * (self.num_tokens + rows) * self.dim**2

    def value_conv_macs(self) -> int:
        """w²PC, and PC² for values of the patches."""
        return super().value_conv_macs() + (0 if self.value_conv is None else self.num_patches * self.dim**2)

    def mixing_macs(self) -> int:
        """2NkC for the softmax's two products, NkC for each of E and F (once where E = F)."""
        projections = 1 if self.share in ("kv", "layers") else 2
        return (2 + projections) * self.num_tokens * self.k * self.dim

    def share_with(self, first: Attention) -> None:
        if self.share == "layers" and isinstance(first, LinformerAttention):
            self.E = self.F = first.E

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("E", "F"):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != self.E.shape:
                raise UserError(
                    f"{prefix}{name}: has shape {tuple(loaded.shape)}, this model needs {tuple(self.E.shape)}; "
                    "for another number of tokens pass it through effvit.model.resize.resize_projection"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
