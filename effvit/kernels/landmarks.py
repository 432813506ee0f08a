"""Which tokens of a grid are averaged into one: landmarks as compact blocks of patches."""

from math import ceil, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


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
    lengths = torch.full((m,), n // m)
    lengths[m - n % m :] += 1
    return torch.arange(m).repeat_interleave(lengths)
