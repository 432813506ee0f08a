"""Linear maps: x Wᵀ + b."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit import policy
from effvit.kernels import choice


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of rows ``(..., in)`` with ``weight`` ``(out, in)`` and ``bias`` ``(out,)``: ``(..., out)``."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own product."""
    return F.linear(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """OneDNN's product, and those of its gradients."""
    return OneDNNLinear.apply(x, weight, bias)


def suits_onednn(x: Tensor, *others: Tensor) -> bool:
    """Whether products of ``x`` are oneDNN's to compute: float32 without autocast, on a processor where that pays."""
    return (
        policy.ONEDNN_PRODUCTS
        and choice.on_cpu(x, *others)
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.ndim > 1
        and x.numel() > 0
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a`` ``(..., k)`` times the rows of ``b`` ``(n, k)``: a bᵀ + bias, ``(..., n)``."""
    # Where gradients of gradients are wanted, as a product that autograd knows.
    if torch.is_grad_enabled() or not suits_onednn(a):
        return F.linear(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """∂yᵀ x ``(out, in)`` of gradients ``(..., out)`` and rows ``(..., in)``."""
    gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
    if not policy.ONEDNN_WEIGHT_GRADIENTS:
        return torch.mm(gradient.T, x)
    # The smaller of both on the left: oneDNN writes that one anew for its kernel.
    if gradient.shape[1] <= x.shape[1]:
        return product(gradient.T, x.T)
    return product(x.T, gradient.T).T


class OneDNNLinear(torch.autograd.Function):
    """y = x Wᵀ + b; ∂x = ∂y W, ∂W = ∂yᵀ x, ∂b = Σ ∂y."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = product(gradient, weight.T) if needs_x else None
        d_weight = weight_gradient(gradient, x) if needs_weight else None
        return d_x, d_weight, gradient.flatten(0, -2).sum(0) if needs_bias else None


FORMS = {"by PyTorch": by_pytorch, "by oneDNN": by_onednn}
