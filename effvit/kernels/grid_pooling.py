"""Means of the patches in cells of the grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit.kernels import token_means

Grid = tuple[int, int]


def reference(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Tensor:
    """Patches ``(B, gh*gw, C)`` to the means of ``rows x columns`` cells, ``(B, rows*columns, C)``, both row-major.

    Cell i of n along a side of g patches has the patches from ⌊i g / n⌋ to ⌈(i + 1) g / n⌉: where n does not divide g,
    neighbours share one. ``members`` is what `uneven_members` gives, for the form that needs it.
    """
    grid = x.unflatten(1, grid_size)
    rows, columns = (_ranges(side, number) for side, number in zip(grid_size, cells, strict=True))
    means = [grid[:, row, column].flatten(1, 2).mean(dim=1) for row in rows for column in columns]
    return torch.stack(means, dim=1)


def unchanged(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Tensor:
    """Cells of a patch each."""
    return x


def as_images(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Tensor:
    """Channels last in memory, so nothing is copied but the result for a single sample, which PyTorch turns around."""
    images = x.transpose(1, 2).unflatten(2, grid_size)
    return F.adaptive_avg_pool2d(images, cells).flatten(2).transpose(1, 2).contiguous()


def even(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Tensor:
    """Means of cells that divide the grid."""
    (rows, columns), (height, width) = cells, (side // number for side, number in zip(grid_size, cells, strict=True))
    return x.unflatten(1, (rows, height, columns, width)).mean(dim=(2, 4)).flatten(1, 2)


def by_members(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Tensor:
    """One product with the cells' members."""
    assert members is not None, "of cells that divide the grid"
    return token_means.as_product(x, members)


def uneven_members(grid_size: Grid, cells: Grid) -> Tensor | None:
    """Which patches each cell is the mean of, ``(rows*columns, gh*gw)``; None where cells divide the grid.

    As `effvit.kernels.token_means.scaled` gives them.
    """
    if not any(side % number for side, number in zip(grid_size, cells, strict=True)):
        return None
    with torch.device("cpu"):  # a table, which must have its values wherever the weights are
        sides = []
        for side, number in zip(grid_size, cells, strict=True):
            table = torch.zeros(number, side)
            for row, members in zip(table, _ranges(side, number), strict=True):
                row[members] = 1
            sides.append(table)
        return token_means.scaled(torch.kron(*sides))


def _ranges(side: int, number: int) -> list[slice]:
    return [slice(i * side // number, -(-(i + 1) * side // number)) for i in range(number)]


def _as_on_cuda(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    members = uneven_members(grid_size, cells)
    return even(x, grid_size, cells) if members is None else by_members(x, grid_size, cells, members.to(x))


FORMS = {"as images": as_images, "as on CUDA": _as_on_cuda}
