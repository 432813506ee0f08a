"""What layers of different models have in common, and how far and how broadly their heads look.

Shapes: B images, H heads, N tokens (the class token, then gh*gw patches, row-major), C features. A matrix A of a
mechanism that is linear in its values may have negative entries and rows that do not sum to one: wherever weights are
needed, its magnitudes are taken, and rows are divided by their sums.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class LinearCKA:
    """Linear centred kernel alignment of every pair of layers, from batches of images as they come.

    Kornblith et al. 2019 (arXiv 1905.00414, eq. 3 and 4): CKA(X, Y) = ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms, for
    features X ``(n, C)`` and Y ``(n, C')`` of the same n images, columns centred. Co-moments of all features are kept
    in float64 and merged by Chan et al.'s update, so that the result is that of all images at once, however they
    were batched. That takes 8 (Σ C)² bytes: 10 MiB for four blocks of width 48 of six models.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = list(widths)
        total = sum(self.widths)
        self.n = 0
        self.mean = torch.zeros(total, dtype=torch.float64)
        self.comoment = torch.zeros(total, total, dtype=torch.float64)  # Σ (x - mean) (x - mean)ᵀ

    def update(self, layers: Sequence[Tensor]) -> None:
        """Add the features ``(B, C)`` of a batch, one tensor a layer."""
        x = torch.cat([layer.detach().cpu().double() for layer in layers], dim=1)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features of widths {[layer.shape[1] for layer in layers]}, expected {self.widths}")
        total = self.n + len(x)
        mean = x.mean(dim=0)
        gap, x = mean - self.mean, x - mean
        self.comoment.addmm_(x.T, x).addr_(gap, gap, alpha=self.n * len(x) / total)
        self.mean += gap * (len(x) / total)
        self.n = total

    def matrix(self) -> Tensor:
        """CKA of all pairs, ``(layers, layers)`` float64; NaN with a layer whose features do not vary."""
        blocks = [row.split(self.widths, dim=1) for row in self.comoment.split(self.widths)]
        hsic = torch.stack([torch.stack([block.square().sum() for block in row]) for row in blocks])
        norms = hsic.diagonal().sqrt()
        return hsic / torch.outer(norms, norms)


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its device, or on the CPU where that has no float64 (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def weights_of(attention_map: Tensor) -> Tensor:
    """Magnitudes of ``(B, H, N, M)`` in float64 with rows that sum to one; a row of zeros stays one."""
    magnitudes = in_float64(attention_map).abs()
    return magnitudes / magnitudes.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def patch_distances(grid: tuple[int, int], patch_size: int) -> Tensor:
    """Euclidean distance in pixels between the centres of any two patches: ``(P, P)`` float64."""
    rows, columns = (torch.arange(side, dtype=torch.float64) * patch_size for side in grid)
    centres = torch.cartesian_prod(rows, columns)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(attention_map: Tensor, distances: Tensor) -> Tensor:
    """Mean distance between a patch and the patches that it attends to, weighted by attention: ``(B, H)``.

    Dosovitskiy et al. 2021 (arXiv 2010.11929, figure 7). The class token has no place in the image: its row and column
    of ``(B, H, N, N)`` are left out, and rows sum to one without it. Every query counts alike.
    """
    weights = weights_of(attention_map[..., 1:, 1:])
    return (weights * distances.to(weights.device)).sum(dim=-1).mean(dim=-1)


def attention_entropy(attention_map: Tensor) -> Tensor:
    """Mean over all queries of -Σ p ln p in nats, p a row of ``(B, H, N, N)``, the class token included: ``(B, H)``.

    0 where each token attends to one alone, ln N where to all alike.
    """
    return torch.special.entr(weights_of(attention_map)).sum(dim=-1).mean(dim=-1)


def of_uniform_attention(distances: Tensor) -> tuple[float, float]:
    """`attention_distance` in pixels and `attention_entropy` in nats of attention to all tokens alike.

    Args:
        distances: those of `patch_distances`, ``(P, P)``.
    """
    return distances.mean().item(), math.log(1 + len(distances))
