"""Linformer: keys and values of N tokens projected to k rows.

Wang et al. 2020 (arXiv 2006.04768, eq. 7).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import Attention, AttentionOptions, Grid, register, softmax_attention
from effvit.errors import UserError
from effvit.kernels.linear import linear


class LinformerOptions(AttentionOptions):
    """k rows; E, F shared by: none (per head), heads (E ≠ F), kv (E = F), layers (one E for the whole model)."""

    k: int = Field(64, ge=1)
    share: Literal["none", "heads", "kv", "layers"] = "heads"

    def check_grid(self, grid_size: Grid) -> None:
        tokens = 1 + grid_size[0] * grid_size[1]
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

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: LinformerOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.k, self.share = options.k, options.share
        heads = (num_heads,) if self.share == "none" else ()
        # A row of E x is then a sum of N unit-scale tokens scaled back to unit scale.
        shape, std = (*heads, self.k, self.num_tokens), self.num_tokens**-0.5
        self.E = nn.Parameter(torch.randn(shape) * std)
        self.F = self.E if self.share in ("kv", "layers") else nn.Parameter(torch.randn(shape) * std)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        w_q, w_k, w_v = self.qkv.weight.chunk(3)
        b_q, b_k, b_v = self.qkv.bias.chunk(3) if self.qkv.bias is not None else (None, None, None)
        q = self.split_heads(linear(x, w_q, b_q))
        if self.share == "none":
            # Each head has its own E: mixing d columns after the map is cheaper than C columns before it.
            k = self.E @ self.split_heads(linear(x, w_k)) + self._bias(b_k)
            v = self.F @ self.split_heads(linear(x, w_v)) + self._bias(b_v)
            return q, k, v
        # E (x W) = (E x) W: projecting tokens first applies the maps to k rows instead of N. The bias is added
        # after the projection, once a row.
        ex = self._project_tokens(self.E, x)  # (B, k, C)
        fx = ex if self.F is self.E else self._project_tokens(self.F, x)
        return q, self.split_heads(linear(ex, w_k, b_k)), self.split_heads(linear(fx, w_v, b_v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        return softmax_attention(q, k, v, self.dropout_p)

    def map_values(self, v: Tensor) -> Tensor:
        """F itself: softmax(q k'ᵀ / √d) F is the matrix that is applied to x W_v."""
        return self.F.to(v.dtype).expand(*v.shape[:2], -1, -1)

    def map_macs(self) -> int:
        """NC² for the queries, NC² for the output, 2kC² for keys and values (2NC² with ``share=none``)."""
        rows = self.num_tokens if self.share == "none" else self.k
        return 2 * (self.num_tokens + rows) * self.dim**2

    def mixing_macs(self) -> int:
        """2NkC for the softmax's two products, NkC for each of E and F (once where E = F)."""
        projections = 1 if self.share in ("kv", "layers") else 2
        return (2 + projections) * self.num_tokens * self.k * self.dim

    def share_with(self, first: Attention) -> None:
        if self.share == "layers" and isinstance(first, LinformerAttention):
            self.E = self.F = first.E

    @staticmethod
    def _project_tokens(projection: Tensor, x: Tensor) -> Tensor:
        # As a batch of products: one product over all samples would have to turn x around in memory first.
        return torch.bmm(projection.expand(x.shape[0], -1, -1), x)

    def _bias(self, bias: Tensor | None) -> Tensor | float:
        return 0.0 if bias is None else bias.view(self.num_heads, 1, self.head_dim)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("E", "F"):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != self.E.shape:
                raise UserError(
                    f"{prefix}{name}: has shape {tuple(loaded.shape)}, this model needs {tuple(self.E.shape)}; "
                    "for another number of tokens pass it through effvit.attention.linformer.resize_projection"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def resize_projection(projection: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """Carry E or F ``(..., k, N_old)`` over to another grid of patches: ``(..., k, N_new)``.

    The patch part of each row is an image of the old grid, interpolated bilinearly; the class token's column is
    kept; all is scaled by N_old / N_new, so that rows of E x keep their scale.
    """
    n_old, n_new = (1 + grid[0] * grid[1] for grid in (old_grid, new_grid))
    if projection.shape[-1] != n_old:
        raise UserError(f"projection of {projection.shape[-1]} tokens: a grid of {old_grid} has {n_old}")
    rows = projection.flatten(0, -2)
    patches = rows[:, 1:].view(-1, 1, *old_grid)
    patches = F.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False).flatten(1)
    resized = torch.cat([rows[:, :1], patches], dim=1) * (n_old / n_new)
    return resized.view(*projection.shape[:-1], n_new)
