"""The merged map of queries, keys and values: x Wᵀ + b as three results, rows of W in the order q, k, v."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit.kernels import choice
from effvit.kernels.linear import product, weight_gradient

Thirds = tuple[Tensor, Tensor, Tensor]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Thirds:
    """Tokens ``(B, N, C)`` by ``weight`` ``(3C, C)`` and ``bias`` ``(3C,)`` to q, k, v ``(B, N, C)``."""
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    return q, k, v


def as_three_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Thirds:
    """A product for each result, on a CPU."""
    q, k, v = ThreeProducts.apply(x, weight, bias)
    return q, k, v


class ThreeProducts(torch.autograd.Function):
    """Each result whole in memory: nothing of 3C columns is written, cut or glued.

    An accelerator is better off with one product, of which the parts are views; a CPU pays for each pass over tokens.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(product(x, w, b) for w, b in zip(weight.chunk(3), biases, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        w_q, w_k, w_v = weight.chunk(3)
        q, k, v = gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = product(q, w_q.T) + product(k, w_k.T) + product(v, w_v.T) if needs_x else None
        d_weight = torch.cat([weight_gradient(g, x) for g in gradients]) if needs_weight else None
        d_bias = torch.cat([g.flatten(0, -2).sum(0) for g in gradients]) if needs_bias else None
        return d_x, d_weight, d_bias


FORMS = {"as three products": as_three_products}
