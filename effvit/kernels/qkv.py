"""The merged map of queries, keys and values: x Wᵀ + b as three results, rows of W in the order q, k, v."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.kernels import choice
from effvit.kernels.linear import linear, product, weight_gradient

Thirds = tuple[Tensor, Tensor, Tensor]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Thirds:
    """Tokens ``(B, N, C)`` by ``weight`` ``(3C, C)`` and ``bias`` ``(3C,)`` to q, k, v ``(B, N, C)``."""
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    return q, k, v


def qkv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Thirds:
    """`reference`, as three products on a CPU."""
    if choice.on_cpu(x) and not torch.is_autocast_enabled("cpu"):
        return ThreeProducts.apply(x, weight, bias)
    return reference(x, weight, bias)


def apply_qkv(layer: nn.Module, x: Tensor) -> Thirds:
    """Call a merged layer on tokens ``(B, N, C)``: q, k, v ``(B, N, C)``, by `qkv` where that is the same."""
    if choice.on_cpu(x) and choice.is_plain(layer):
        return qkv(x, layer.weight, layer.bias)
    q, k, v = layer(x).chunk(3, dim=-1)
    return q, k, v


class QKVLinear(nn.Linear):
    """A merged layer that can be called on other rows for each map; as an ``nn.Linear`` of 3C columns otherwise."""

    def __init__(self, dim: int, bias: bool = True) -> None:
        super().__init__(dim, 3 * dim, bias=bias)

    def forward(self, x: Tensor, of_k: Tensor | None = None, of_v: Tensor | None = None) -> Any:
        """Rows ``(B, N, C)`` to ``(B, N, 3C)``; with rows for keys and values, to q, k, v ``(B, rows, C)``."""
        if of_k is None or of_v is None:
            return linear(x, self.weight, self.bias)
        w_q, w_k, w_v = self.weight.chunk(3)
        if self.bias is None:
            return linear(x, w_q), linear(of_k, w_k), linear(of_v, w_v)
        b_q, b_k, b_v = self.bias.chunk(3)
        return linear(x, w_q, b_q), linear(of_k, w_k, b_k), linear(of_v, w_v, b_v)


def apply_qkv_apart(layer: nn.Module, x: Tensor, of_k: Tensor, of_v: Tensor) -> Thirds:
    """Call a merged layer on other rows for each map, ``(B, rows, C)``: q, k, v ``(B, rows, C)``."""
    if choice.is_plain(layer, QKVLinear):
        q, k, v = layer(x, of_k, of_v)
        return q, k, v
    # Whatever took its place, such as an adapter, and hooks know rows of all three maps alone.
    keys = layer(of_k).chunk(3, dim=-1)
    values = keys if of_v is of_k else layer(of_v).chunk(3, dim=-1)
    return layer(x).chunk(3, dim=-1)[0], keys[1], values[2]


def apply_v(layer: nn.Module, x: Tensor) -> Tensor:
    """Call the values' part of a merged layer on tokens ``(B, N, C)``: ``(B, N, C)``."""
    if choice.is_plain(layer) or choice.is_plain(layer, QKVLinear):
        bias = None if layer.bias is None else layer.bias.chunk(3)[2]
        return linear(x, layer.weight.chunk(3)[2], bias)
    return layer(x).chunk(3, dim=-1)[2]


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        w_q, w_k, w_v = weight.chunk(3)
        q, k, v = gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = product(q, w_q.T) + product(k, w_k.T) + product(v, w_v.T) if needs_x else None
        d_weight = torch.cat([weight_gradient(g, x) for g in gradients]) if needs_weight else None
        d_bias = torch.cat([g.flatten(0, -2).sum(0) for g in gradients]) if needs_bias else None
        return d_x, d_weight, d_bias


FORMS = {"three products": ThreeProducts.apply}
