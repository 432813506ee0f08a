"""Linear maps whose products oneDNN computes where they run eagerly in float32 on a CPU of AMD's.

PyTorch sends such products to MKL, which measures about half of oneDNN's speed at a ViT's shapes on an AMD processor
with AVX-512 (many rows, few columns: 80 against 180 GFLOP/s on one Zen 5 core), and 0.9 of it with AVX2 (Zen 3). On a
processor of Intel's (Sapphire Rapids) both are as fast forward, MKL 1.3 to 2.5 times as fast for the gradient of the
weights, and 3 times for 65 rows of 48 columns. Everywhere else this is ``torch.nn.functional``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.processor import is_amds

# What torch.compile's CPU backend itself emits for a linear map; builds without oneDNN lack it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

_FASTER_THAN_MKL = is_amds()
# oneDNN writes ∂y and x anew for the product ∂yᵀ x, where MKL reads them as they lie. Its products make up for that on
# Zen 5 (0.7 to 0.9 of MKL's time, 16 K rows of 192 and 384 columns); on Zen 4 it takes 1.15 times as long, on Zen 3
# 1.4 to 2 times.
_REWRITING_PAYS = is_amds(least_family=26)


class Linear(nn.Linear):
    """``nn.Linear`` with the same parameters and result, through ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``(..., in_features)`` to ``(..., out_features)``."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of rows ``(..., in)`` with ``weight`` ``(out, in)`` and ``bias`` ``(out,)``."""
    return LinearMap.apply(x, weight, bias) if suits_onednn(x) else F.linear(x, weight, bias)


def suits_onednn(x: Tensor) -> bool:
    """Whether products with ``x`` are oneDNN's to compute: eager, on a CPU, of float32 as they are."""
    eager = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    plain = type(x) in (Tensor, nn.Parameter)  # no subclass, such as one without data
    rows = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim > 1 and x.numel() > 0
    return _ONEDNN is not None and _FASTER_THAN_MKL and eager and plain and rows


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a`` ``(..., k)`` times the rows of ``b`` ``(n, k)``: a bᵀ + bias, ``(..., n)``."""
    # Where gradients of gradients are wanted, as a product that autograd knows.
    if _ONEDNN is None or torch.is_grad_enabled() or not suits_onednn(a):
        return F.linear(a, b, bias)
    return _ONEDNN(a, b, bias, "none", [], "")


class LinearMap(torch.autograd.Function):
    """y = x Wᵀ + b; ∂x = ∂y W, ∂W = ∂yᵀ x, ∂b = Σ ∂y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = product(gradient, weight.T) if needs_x else None
        d_weight = weight_gradient(gradient, x) if needs_weight else None
        return d_x, d_weight, gradient.flatten(0, -2).sum(0) if needs_bias else None


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """∂yᵀ x ``(out, in)`` of gradients ``(..., out)`` and rows ``(..., in)``."""
    gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
    if not (_FASTER_THAN_MKL and _REWRITING_PAYS):
        return torch.mm(gradient.T, x)
    # The smaller of both on the left: oneDNN writes that one anew for its kernel.
    if gradient.shape[1] <= x.shape[1]:
        return product(gradient.T, x.T)
    return product(x.T, gradient.T).T
