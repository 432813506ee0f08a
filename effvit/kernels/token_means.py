"""Means of tokens, such as landmarks, which are compact blocks of patches."""

from math import ceil, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


def reference(x: Tensor, members: Tensor) -> Tensor:
    """Tokens ``(B, N, C)`` to the means of those of which a row of ``members`` ``(m, N)`` is not 0: ``(B, m, C)``."""
    ones = (members != 0).to(x.dtype)
    return ones @ x / ones.sum(dim=-1, keepdim=True)


def as_product(x: Tensor, members: Tensor) -> Tensor:
    """Of ``members`` whose rows are zeros and equal powers of two: see `scaled`."""
    sums = torch.bmm(members.to(x.dtype).expand(x.shape[0], -1, -1), x)
    return (sums / members.sum(dim=-1, keepdim=True)).to(x.dtype)


def scaled(members: Tensor) -> Tensor:
    """Ones become the power of two that makes sums of tokens no larger than tokens: exact in any precision."""
    return torch.ldexp(members, -torch.frexp(members.sum(dim=-1, keepdim=True)).exponent)


def landmark_members(grid_size: Grid, m: int, prefix_tokens: int = 1) -> Tensor:
    """Which tokens each landmark is the mean of: ones and zeros of shape ``(m, N)``, a single one in each column.

    Each prefix token alone, then m - S segments of the patches in block order. Where m is at most S, the last landmark
    is the mean of all tokens that are left.
    """
    patches = grid_size[0] * grid_size[1]
    landmark = torch.arange(prefix_tokens + patches).clamp(max=m - 1)
    if m > prefix_tokens:
        segment = segments(patches, m - prefix_tokens)
        landmark[prefix_tokens + block_order(grid_size, m - prefix_tokens)] = prefix_tokens + segment
    return F.one_hot(landmark, m).T.float()


def block_order(grid_size: Grid, num_segments: int) -> Tensor:
    """Order of the patches ``(P,)`` in which contiguous segments are compact blocks of the grid.

    The grid is cut into bands about as high as a square block of P / num_segments patches; each band is read column
    by column.
    """
    rows, columns = grid_size
    height = ceil(sqrt(rows * columns / num_segments))
    bands = ceil(rows / height)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    return (((row * bands // rows) * columns + column) * rows + row).flatten().argsort()


def segments(n: int, m: int) -> Tensor:
    """Segment of each of n positions, ``(n,)``: m contiguous ones that differ in length by one at most.

    With s = ⌊n/m⌋ the first (s+1)m - n segments have s positions and the rest s + 1: nothing is padded.
    """
    length, position = n // m, torch.arange(n)
    shorter = (length + 1) * m - n
    behind = position - shorter * length
    return torch.where(behind < 0, position // max(length, 1), shorter + behind // (length + 1))


FORMS = {"as product": as_product}
