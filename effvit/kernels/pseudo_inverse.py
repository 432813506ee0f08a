"""Moore-Penrose inverse of row-stochastic matrices by iteration.

Razavi et al. 2014, as Nyströmformer uses it (Xiong et al. 2021, arXiv 2102.03902, eq. 11).
"""

from typing import Any

import torch
from torch import Tensor

from effvit.kernels import choice

MOST_ITERATIONS = 20
"""From here on float32 gains nothing, and what it rounded away grows by 13/4 a step, out of range from some 27 on."""


def reference(a: Tensor, iterations: int) -> Tensor:
    """Z ← ¼ Z (13 I - AZ (15 I - AZ (7 I - AZ))) of matrices ``(..., m, m)`` whose rows sum to one.

    Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞) for each matrix by itself, so that a sample never depends on its batch; ‖A‖∞ = 1.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def with_addends(a: Tensor, iterations: int) -> Tensor:
    """Each difference is a product's own addend: no pass over matrices but the four products."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    shape, a, z = a.shape, a.reshape(-1, *a.shape[-2:]), z.reshape(-1, *a.shape[-2:])
    for _ in range(iterations):
        az = a @ z
        bracket = torch.baddbmm(15 * identity, az, 7 * identity - az, alpha=-1)
        bracket = torch.baddbmm(13 * identity, az, bracket, alpha=-1)
        z = torch.baddbmm(identity, z, bracket, beta=0, alpha=0.25)
    return z.view(shape)


def in_triton(a: Tensor, iterations: int) -> Tensor:
    """By `effvit.kernels.cuda`."""
    return InTriton.apply(a, iterations)


class InTriton(torch.autograd.Function):
    """By `effvit.kernels.cuda`: float32, up to 64 rows. Training keeps A; the iterates are computed again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, iterations: int) -> Tensor:
        from effvit.kernels.cuda.pseudo_inverse import invert

        ctx.iterations = iterations
        ctx.save_for_backward(a)
        return invert(a, iterations)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from effvit.kernels.cuda.pseudo_inverse import invert_backward

        (a,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *choice.through_equation(lambda a: reference(a, ctx.iterations), (a,), *gradients), None
        return invert_backward(*gradients, a, ctx.iterations), None


FORMS = {"with addends": with_addends}
