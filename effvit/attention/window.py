"""Window attention: each patch attends to the patches of its window.

Liu et al. 2021, Swin (arXiv 2103.14030, section 3.2), without relative positions; windows that shift by block. Li et
al. 2022, ViTDet (arXiv 2203.16527, section 3): global attention in every g-th block.
"""

from typing import Any

from pydantic import Field
from torch import Tensor

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.kernels.dispatch import softmax_attention
from effvit.kernels.prefix_and_patches import prefix_and_patches
from effvit.kernels.window_attention import Windows


class WindowOptions(AttentionOptions):
    """w patches a side; whether windows move by w // 2 in every second block; every g-th block exact (0 none)."""

    window_size: int = Field(4, ge=1)
    shift: bool = False
    global_every: int = Field(0, ge=0)


@register
class WindowAttention(Attention):
    """softmax(q kᵀ / √d) v over a patch's w x w window and the prefix tokens; exact attention for prefix tokens.

    A window as large as the grid is exact attention, and so is block g, 2g, … of ``global_every`` g, counted from 1.
    Dropout acts on the softmaxes.
    """

    Options = WindowOptions
    complexity = "O(N w²)"
    paper = "Liu et al. 2021, arXiv 2103.14030"
    needs_grid = True

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: WindowOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        w, g, number = options.window_size, options.global_every, self.layer + 1
        self.is_global = w >= max(grid_size) or (g > 0 and number % g == 0)
        self.windows = Windows(*grid_size, w, shift=w // 2 if options.shift and number % 2 == 0 else 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        if self.is_global:
            return softmax_attention(q, k, v, self.dropout_p)
        tokens, windows = (self.prefix_tokens, self.num_patches), [self.windows] * self.num_heads
        return prefix_and_patches(q, k, v, tokens, windows, self.dropout_p)

    def mixing_macs(self) -> int:
        """2N²C where global; else 2SNC for prefix tokens and 2P'C(w² + S) with P' patches of the padded grid."""
        n, s, c = self.num_tokens, self.prefix_tokens, self.dim
        if self.is_global:
            return 2 * n**2 * c
        return 2 * s * n * c + 2 * self.windows.area * c * (self.windows.size**2 + s)
