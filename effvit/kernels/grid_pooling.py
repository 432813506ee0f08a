"""Means of the patches in cells of the grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit import policy
from effvit.kernels import choice

Grid = tuple[int, int]


def reference(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    """Patches ``(B, gh*gw, C)`` to the means of ``rows x columns`` cells, ``(B, rows*columns, C)``, both row-major.

    Cell i of n along a side of g patches has the patches from ⌊i g / n⌋ to ⌈(i + 1) g / n⌉: where n does not divide g,
    neighbours share one.
    """
    grid = x.unflatten(1, grid_size)
    rows, columns = (_ranges(side, number) for side, number in zip(grid_size, cells, strict=True))
    means = [grid[:, row, column].flatten(1, 2).mean(dim=1) for row in rows for column in columns]
    return torch.stack(means, dim=1)


@choice.primitive
def grid_pooling(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    """`reference` by the form that suits the device."""
    if cells == grid_size:
        return x
    if policy.ONLY_REFERENCE:
        return reference(x, grid_size, cells)
    return by_sides(x, grid_size, cells) if x.device.type == "cuda" else as_images(x, grid_size, cells)


def as_images(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    """Channels last in memory, so nothing is copied but the result for a single sample, which PyTorch turns around."""
    images = x.transpose(1, 2).unflatten(2, grid_size)
    return F.adaptive_avg_pool2d(images, cells).flatten(2).transpose(1, 2).contiguous()


def by_sides(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    """Means of rows, then of columns. PyTorch's pooling adds its gradients up in no fixed order on CUDA."""
    grid = x.unflatten(1, grid_size)
    for dim, number in enumerate(cells, start=1):
        grid = _means(grid, dim, number)
    return grid.flatten(1, 2)


def _means(x: Tensor, dim: int, number: int) -> Tensor:
    """Means over ``number`` ranges of a dimension; where they overlap, a product with their membership."""
    side = x.shape[dim]
    if side % number == 0:
        return x.unflatten(dim, (number, side // number)).mean(dim + 1)
    cell, place = torch.arange(number, device=x.device)[:, None], torch.arange(side, device=x.device)
    first, end = cell * side // number, ((cell + 1) * side + number - 1) // number
    shares = ((place >= first) & (place < end)).to(x.dtype) / (end - first)
    with choice.without_autocast(x):
        means = shares.to(x.dtype) @ x.flatten(dim + 1).flatten(0, dim - 1)
    return means.unflatten(0, x.shape[:dim]).unflatten(-1, x.shape[dim + 1 :])


def _ranges(side: int, number: int) -> list[slice]:
    return [slice(i * side // number, -(-(i + 1) * side // number)) for i in range(number)]


FORMS = {"as images": as_images, "by sides": by_sides}
