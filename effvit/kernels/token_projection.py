"""Products over tokens: E x for each of one or two matrices, the same for all samples."""

import torch
from torch import Tensor

Projected = tuple[Tensor, ...]


def reference(x: Tensor, *projections: Tensor) -> Projected:
    """Tokens ``(B, N, C)`` by matrices ``(k, N)``: ``(B, k, C)`` each."""
    return tuple(projection @ x for projection in projections)


def one_by_one(x: Tensor, *projections: Tensor) -> Projected:
    """A batch of products for each matrix: one over all samples would have to turn x around in memory first."""
    return tuple(torch.bmm(projection.expand(x.shape[0], -1, -1), x) for projection in projections)


def at_once(x: Tensor, *projections: Tensor) -> Projected:
    """All matrices one below the other, in the precision of x: x is read once, and its gradient written once."""
    stacked = torch.cat(projections) if len(projections) > 1 else projections[0]
    (both,) = one_by_one(x, stacked.to(x.dtype))
    return both.split([len(projection) for projection in projections], dim=1)


FORMS = {"one by one": one_by_one, "at once": at_once}
