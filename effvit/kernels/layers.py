"""Layers called as what their class says: by the primitives where that is the same, else by a module's call."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effvit import policy
from effvit.kernels import choice
from effvit.kernels.dispatch import linear, qkv, turned_qkv, turns_maps
from effvit.kernels.qkv import Thirds


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer on rows ``(..., in)``: ``(..., out)``."""
    if choice.on_cpu(x) and choice.is_plain(layer):
        return linear(x, layer.weight, layer.bias)
    policy.note("linear", "of_the_layer")
    return layer(x)


def apply_qkv(layer: nn.Module, x: Tensor) -> Thirds:
    """Call a merged layer on tokens ``(B, N, C)``: q, k, v ``(B, N, C)``."""
    if choice.on_cpu(x) and choice.is_plain(layer):
        return qkv(x, layer.weight, layer.bias)
    policy.note("qkv", "of_the_layer")
    q, k, v = layer(x).chunk(3, dim=-1)
    return q, k, v


def apply_turned_qkv(layer: nn.Module, x: Tensor, omega: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Call a merged layer on tokens ``(B, N, C)``: q, k, v; where that saves products, queries and keys turned.

    They are then Ωq̂ and Ωk̂ of each head, with x̂ = scale x and Ω ``(d, d)`` of orthogonal rows, and 1 / ‖Ωᵢ‖ ``(d,)``
    comes after v.
    """
    if not (choice.is_plain(layer) and turns_maps(x, omega)):
        return apply_qkv(layer, x)
    q, k, v = turned_qkv(x, layer.weight, layer.bias, omega, scale)
    norms = omega.to(torch.promote_types(layer.weight.dtype, torch.float32)).norm(dim=1)
    return q, k, v, norms.reciprocal()


def apply_qkv_apart(layer: nn.Module, x: Tensor, rows: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Thirds:
    """Call a merged layer on tokens ``(B, N, C)`` for queries and on what ``rows`` makes of them for keys and values.

    Args:
        layer: of 3C columns.
        x: the tokens.
        rows: tokens to those of keys and of values, ``(B, rows, C)`` each.

    Returns:
        q ``(B, N, C)``, k and v ``(B, rows, C)``.
    """
    x = choice.cast_once(x)
    of_k, of_v = rows(x)
    if choice.is_plain(layer):
        biases = (None,) * 3 if layer.bias is None else layer.bias.chunk(3)
        q, k, v = map(linear, (x, of_k, of_v), layer.weight.chunk(3), biases)
        return q, k, v
    # Whatever took its place, such as an adapter, and hooks know rows of all three maps alone.
    keys = layer(of_k).chunk(3, dim=-1)
    values = keys if of_v is of_k else layer(of_v).chunk(3, dim=-1)
    return layer(x).chunk(3, dim=-1)[0], keys[1], values[2]


def apply_v(layer: nn.Module, x: Tensor) -> Tensor:
    """Call the values' part of a merged layer on tokens ``(B, N, C)``: ``(B, N, C)``."""
    if choice.is_plain(layer):
        bias = None if layer.bias is None else layer.bias.chunk(3)[2]
        return linear(x, layer.weight.chunk(3)[2], bias)
    return layer(x).chunk(3, dim=-1)[2]


def qkv_bias(layer: nn.Module, x: Tensor) -> Thirds:
    """What a merged layer adds to q, k and v of tokens ``(B, N, C)``: ``(C,)`` each."""
    bias = layer.bias if choice.is_plain(layer) else layer(x.new_zeros(1, 1, x.shape[-1]))[0, 0]
    b_q, b_k, b_v = (x.new_zeros(3 * x.shape[-1]) if bias is None else bias).chunk(3)
    return b_q, b_k, b_v
