"""φ of blocks of tokens, on the way there and back; what the kernels of `feature_attention` share.

A program holds one strip of features at a time, and sums over some tokens in their order.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import is_exact, product, rows_of, side
from effvit.kernels.focus import EPS

SUMMED = 1024
"""Tokens that a program sums over."""
APART = 256
"""Tokens per program where nothing is summed."""

_ROWS = 32  # tokens per block
_STRIP = 32  # features
TINY = tl.constexpr(EPS)
"""What focused features add to x."""


@triton.jit
def exponents_of(
    x, first, stride, number, omega, strip, d, m, scale, KERNEL: tl.constexpr,
    OMEGA: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """h = s x Ωᵀ, x, or for ``focused`` p log x̂, of a block of rows and a strip of features."""
    if KERNEL == "focused":
        h = scale * tl.log(x_hat_of(x, first, stride, number, omega, d, ROWS, D))
    elif OMEGA:
        rotation = scale * rows_of(omega, strip, d, m, d, STRIP, D)
        h = product(rows_of(x, first, stride, number, d, ROWS, D), tl.trans(rotation), EXACT)
    else:
        h = rows_of(x + strip, first, stride, number, m - strip, ROWS, STRIP)
    return h


@triton.jit
def largest_of(
    x, first, stride, number, omega, d, m, scale, KERNEL: tl.constexpr,
    OMEGA: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The largest exponent of each query, or 0 where no exponential is taken."""
    largest = tl.zeros((ROWS,), tl.float32)
    if KERNEL == "exp" or KERNEL == "softmax" or KERNEL == "focused":
        largest += float("-inf")
        for strip in range(0, m, STRIP):
            h = exponents_of(x, first, stride, number, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
            is_feature = (strip + tl.arange(0, STRIP) < m)[None, :]
            largest = tl.maximum(largest, tl.max(tl.where(is_feature, h, float("-inf")), axis=1))
    return largest


@triton.jit
def positive(h, is_any, KERNEL: tl.constexpr):
    """φ without ε, of exponents that c has been taken from; 0 where there is none."""
    phi = h
    if KERNEL == "exp" or KERNEL == "softmax" or KERNEL == "focused":
        phi = tl.exp(h)
    if KERNEL == "relu":
        phi = tl.maximum(h, 0.0)
    if KERNEL == "elu":
        phi = tl.exp(tl.minimum(h, 0.0)) + tl.maximum(h, 0.0)
    return tl.where(is_any, phi, 0.0)


@triton.jit
def through_positive(d_phi, phi, KERNEL: tl.constexpr):
    """∂h from ∂φ and φ without ε: exp' = exp, relu' = 1 above zero, elu' = exp but at most 1."""
    d_h = d_phi
    if KERNEL == "exp" or KERNEL == "softmax" or KERNEL == "focused":
        d_h = d_phi * phi
    if KERNEL == "relu":
        d_h = tl.where(phi > 0, d_phi, 0.0)
    if KERNEL == "elu":
        d_h = d_phi * tl.minimum(phi, 1.0)
    return d_h


@triton.jit
def x_hat_of(x, first, stride, number, scale, d, ROWS: tl.constexpr, D: tl.constexpr):
    """x̂ = (relu(x) + ε) / scale of a block of rows, see `effvit.kernels.focus`; ε in columns that are not there."""
    columns = tl.arange(0, D)
    of_columns = tl.load(scale + columns, mask=columns < d, other=1.0)
    return (tl.maximum(rows_of(x, first, stride, number, d, ROWS, D), 0.0) + TINY) / of_columns[None, :]


@triton.jit
def squares_of(x_hat, d, D: tl.constexpr):
    """‖x̂‖² of each row."""
    return tl.sum(tl.where((tl.arange(0, D) < d)[None, :], x_hat * x_hat, 0.0), axis=1)


@triton.jit
def norms_of(x_hat, h, d, D: tl.constexpr):
    """log (‖x̂ᵖ‖ / ‖x̂‖) of each row, which is to be taken from h = p log x̂ for log φ."""
    is_feature = (tl.arange(0, D) < d)[None, :]
    largest = tl.max(tl.where(is_feature, h, float("-inf")), axis=1)
    powers = tl.sum(tl.where(is_feature, tl.exp(2 * (h - largest[:, None])), 0.0), axis=1)
    return largest + 0.5 * (tl.log(powers) - tl.log(squares_of(x_hat, d, D)))


@triton.jit
def place(program, splits, length, number, heads):
    """Head, its sample and its number there, and the first token of this split and that of the next."""
    head = program // splits
    first = program % splits * length
    return head, (head // heads).to(tl.int64), (head % heads).to(tl.int64), first, tl.minimum(first + length, number)


def splits_of(number: int, longest: int) -> tuple[int, int]:
    """How many parts of whole blocks, no longer than this, a sequence has, and how long they are."""
    blocks = triton.cdiv(number, _ROWS)
    length = triton.cdiv(blocks, triton.cdiv(number, longest)) * _ROWS
    return triton.cdiv(number, length), length


def number_of(kernel: str, omega: Tensor | None, x: Tensor) -> int:
    """Features of rows ``(..., d)``."""
    return x.shape[-1] if omega is None or kernel == "focused" else len(omega)


def options_of(kernel: str, omega: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What kernels are compiled for."""
    d, exact = side(q.shape[-1]), is_exact(q, k, v)
    # Norms are of whole rows.
    sides = {"D": d, "E": side(v.shape[-1]), "STRIP": d if kernel == "focused" else _STRIP}
    # A factor in two parts takes twice the registers.
    rows = _ROWS // 2 if exact else _ROWS
    options = {"KERNEL": kernel, "OMEGA": omega is not None and kernel != "focused", "EXACT": exact, "ROWS": rows}
    # All registers that a thread may have: with fewer, two programs share a multiprocessor, and some numbers spill.
    return sides | options | {"num_stages": 1, "maxnreg": 255}
