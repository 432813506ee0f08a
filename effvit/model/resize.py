"""Weights that belong to one grid of patches, carried over to another."""

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit.attention.base import Grid
from effvit.errors import UserError


def resize_positions(positions: Tensor, old_grid: Grid, new_grid: Grid, prefix_tokens: int = 1) -> Tensor:
    """Position embeddings ``(1, S + P, C)`` of one grid of patches to ``(1, S + P', C)`` of another.

    Bicubic with antialiasing, as timm does it; those of the S prefix tokens are kept.
    """
    prefix, patches = positions.float().split([prefix_tokens, positions.shape[1] - prefix_tokens], dim=1)
    patches = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, C, gh, gw)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def resize_projection(projection: Tensor, old_grid: Grid, new_grid: Grid, prefix_tokens: int = 1) -> Tensor:
    """Carry E or F ``(..., k, N_old)`` over to another grid of patches: ``(..., k, N_new)``.

    The patch part of each row is an image of the old grid, interpolated bilinearly; the prefix tokens' columns are
    kept; all is scaled by N_old / N_new, so that rows of E x keep their scale.

    Raises:
        UserError: the projection is not of that many tokens.
    """
    n_old, n_new = (prefix_tokens + grid[0] * grid[1] for grid in (old_grid, new_grid))
    if projection.shape[-1] != n_old:
        raise UserError(f"projection of {projection.shape[-1]} tokens: a grid of {old_grid} has {n_old}")
    prefix, patches = projection.flatten(0, -2).split([prefix_tokens, n_old - prefix_tokens], dim=-1)
    patches = F.interpolate(patches.unflatten(1, (1, *old_grid)), size=new_grid, mode="bilinear", align_corners=False)
    resized = torch.cat([prefix, patches.flatten(1)], dim=1) * (n_old / n_new)
    return resized.view(*projection.shape[:-1], n_new)
