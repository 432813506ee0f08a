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
def grid_pooling(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Tensor:
    """`reference` by the form that suits the device; on CUDA with what `uneven_members` gives."""
    if cells == grid_size:
        return x
    if policy.ONLY_REFERENCE:
        return reference(x, grid_size, cells)
    if x.device.type == "cuda":  # where PyTorch's pooling adds its gradients up in no fixed order
        if members is not None:
            return by_members(x, members)
        if not any(side % number for side, number in zip(grid_size, cells, strict=True)):
            return even(x, grid_size, cells)
    return as_images(x, grid_size, cells)


def as_images(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    """Channels last in memory, so nothing is copied but the result for a single sample, which PyTorch turns around."""
    images = x.transpose(1, 2).unflatten(2, grid_size)
    return F.adaptive_avg_pool2d(images, cells).flatten(2).transpose(1, 2).contiguous()


def even(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    """Means of cells that divide the grid."""
    (rows, columns), (height, width) = cells, (side // number for side, number in zip(grid_size, cells, strict=True))
    return x.unflatten(1, (rows, height, columns, width)).mean(dim=(2, 4)).flatten(1, 2)


def by_members(x: Tensor, members: Tensor) -> Tensor:
    """Sums over members as one product, and their means."""
    sums = torch.bmm(members.to(x.dtype).expand(x.shape[0], -1, -1), x)
    return (sums / members.sum(dim=-1, keepdim=True)).to(x.dtype)


def uneven_members(grid_size: Grid, cells: Grid) -> Tensor | None:
    """Which patches each cell is the mean of, ``(rows*columns, gh*gw)``; None where cells divide the grid.

    Zeros and, in a row, equal powers of two, which are exact in any precision and make sums no larger than patches.
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
        ones = torch.kron(*sides)
        return torch.ldexp(ones, -torch.frexp(ones.sum(dim=-1, keepdim=True)).exponent)


def _ranges(side: int, number: int) -> list[slice]:
    return [slice(i * side // number, -(-(i + 1) * side // number)) for i in range(number)]


def _as_on_cuda(x: Tensor, grid_size: Grid, cells: Grid) -> Tensor:
    members = uneven_members(grid_size, cells)
    return even(x, grid_size, cells) if members is None else by_members(x, members.to(x))


FORMS = {"as images": as_images, "as on CUDA": _as_on_cuda}
