"""Pooled keys and values: all queries attend to the means of cells of the grid.

Wang et al. 2021 and 2022, PVT and PVTv2 (arXiv 2102.12122, 2106.13797, section 3.3), with average pooling alone:
PVTv2's convolution, norm and GELU between pooling and maps are left out.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.kernels.dispatch import grid_pooling, softmax_attention
from effvit.kernels.grid_pooling import uneven_members
from effvit.kernels.layers import apply_qkv_apart, apply_v


class PooledOptions(AttentionOptions):
    """Cells a side that the grid is pooled to; a side with no more patches is left as it is."""

    pool_size: int = Field(4, ge=1)


@register
class PooledAttention(Attention):
    """softmax(q k'ᵀ / √d) v' with k' = Pool(x) W_k and v' = Pool(x) W_v; Pool keeps prefix tokens unchanged.

    Exact attention where the pool is as large as the grid. Dropout acts on the softmax over the M = S + cells rows.
    """

    Options = PooledOptions
    complexity = "O(N M)"
    paper = "Wang et al. 2022, arXiv 2106.13797"
    needs_grid = True
    members: Tensor | None

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: PooledOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.cells = min(options.pool_size, grid_size[0]), min(options.pool_size, grid_size[1])
        self.register_table("members", uneven_members(grid_size, self.cells))
        self.num_pooled = self.prefix_tokens + self.cells[0] * self.cells[1]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        # Means of W x are W times the means: pooling first applies the maps to M rows instead of N.
        q, k, v = apply_qkv_apart(self.qkv, x, lambda x: (self.pool(x),) * 2)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens ``(B, S + P, C)`` to ``(B, M, C)``."""
        if not self.prefix_tokens:
            return grid_pooling(x, self.grid_size, self.cells, self.table("members", x))
        prefix, patches = x.split([self.prefix_tokens, self.num_patches], dim=1)
        return torch.cat([prefix, grid_pooling(patches, self.grid_size, self.cells, self.table("members", x))], dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        return softmax_attention(q, k, v, self.dropout_p)

    def patch_values(self, x: Tensor, v: Tensor) -> Tensor:
        return apply_v(self.qkv, x[:, self.prefix_tokens :])

    def map_values(self, v: Tensor) -> Tensor:
        """Pool itself ``(M, N)``: softmax(q k'ᵀ / √d) Pool is the matrix that is applied to x W_v."""
        eye = torch.eye(self.num_tokens, dtype=v.dtype, device=v.device)
        return self.pool(eye[None]).expand(*v.shape[:2], -1, -1)

    def map_macs(self) -> int:
        """2NC² for queries and output, 2MC² for keys and values."""
        return 2 * (self.num_tokens + self.num_pooled) * self.dim**2

    def value_conv_macs(self) -> int:
        """w²PC, and PC² for values of the patches."""
        return super().value_conv_macs() + (0 if self.value_conv is None else self.num_patches * self.dim**2)

    def mixing_macs(self) -> int:
        """2NMC."""
        return 2 * self.num_tokens * self.num_pooled * self.dim
