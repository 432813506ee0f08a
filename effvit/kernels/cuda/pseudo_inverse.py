"""Moore-Penrose inverse by iteration, a program per matrix, whose products stay in its multiprocessor's cache.

Products are as exact as in float32, whatever PyTorch's may be: the iteration squares the condition number. Factors are
read from memory in strips, as there are not registers for whole ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import on_its_device, product, rows_of, side, store_rows

LARGEST = 64
"""Rows of a matrix."""

_STRIP = tl.constexpr(16)


@triton.jit
def _product(a, b, a_i, a_j, b_i, b_j, m, M: tl.constexpr):
    """A B of matrices ``(m, m)`` in memory, where ``a_i`` and ``a_j`` are the strides of A's rows and columns."""
    strip = tl.arange(0, _STRIP)
    side = tl.arange(0, M)
    y = tl.zeros((M, M), tl.float32)
    for first in range(0, m, _STRIP):
        k = first + strip
        # One offset for all matrices: as many addresses would not fit into registers.
        in_a, in_b = side[:, None] * a_i + k[None, :] * a_j, k[:, None] * b_i + side[None, :] * b_j
        columns = tl.load(a + in_a, mask=(side < m)[:, None] & (k < m)[None, :], other=0.0)
        rows = tl.load(b + in_b, mask=(k < m)[:, None] & (side < m)[None, :], other=0.0)
        y += product(columns, rows, True)
    return y


@triton.jit
def _keep(place, x, m, M: tl.constexpr):
    """Write a matrix, for all threads to read, once all have read what was there."""
    tl.debug_barrier()
    store_rows(place, 0, m, m, m, x, M, M)
    tl.debug_barrier()


@triton.jit
def _add(place, x, m, M: tl.constexpr):
    _keep(place, rows_of(place, 0, m, m, m, M, M) + x, m, M)


@triton.jit
def _identity(M: tl.constexpr):
    return tl.where(tl.arange(0, M)[:, None] == tl.arange(0, M)[None, :], 1.0, 0.0)


@triton.jit
def _polynomials(a, z, x, q, m, M: tl.constexpr):
    """Write X = A Z and Q = 15 I - 7 X + X², and return R = 13 I - X Q."""
    of_x = _product(a, z, m, 1, m, 1, m, M)
    _keep(x, of_x, m, M)
    _keep(q, 15.0 * _identity(M) - 7.0 * of_x + _product(x, x, m, 1, m, 1, m, M), m, M)
    return 13.0 * _identity(M) - _product(x, q, m, 1, m, 1, m, M)


@triton.jit
def iterate(a, iterates, results, place, m, iterations, M: tl.constexpr, KEEPS: tl.constexpr):
    """Z after all iterations, from Z₀ = Aᵀ / max column sum. Kept: Z₀ and what follows, but for the result."""
    number = tl.program_id(0).to(tl.int64)
    a += number * m * m
    x = place + number * 3 * m * m
    q, r = x + m * m, x + 2 * m * m
    given = rows_of(a, 0, m, m, m, M, M)
    z = tl.trans(given) / tl.max(tl.sum(given, axis=0), axis=0)
    if KEEPS:
        iterates += number * iterations * m * m
    else:
        iterates += number * m * m
    for _ in range(iterations):
        _keep(iterates, z, m, M)
        _keep(r, _polynomials(a, iterates, x, q, m, M), m, M)
        z = 0.25 * _product(iterates, r, m, 1, m, 1, m, M)
        if KEEPS:
            iterates += m * m
    _keep(results + number * m * m, z, m, M)


@triton.jit
def back(a, iterates, gradient, d_a, place, m, iterations, M: tl.constexpr):
    """∂A from ∂Z, over the iterates in reverse.

    Of Z' = ¼ Z R: ∂R = ¼ Zᵀ ∂Z', and with W = Xᵀ ∂R ∂X = 7 W - Xᵀ W - W Xᵀ - ∂R Qᵀ, ∂Z = ¼ ∂Z' Rᵀ + Aᵀ ∂X and
    ∂A = ∂X Zᵀ.
    """
    number = tl.program_id(0).to(tl.int64)
    a += number * m * m
    d_a += number * m * m
    z = iterates + (number + 1) * iterations * m * m
    x = place + number * 5 * m * m
    q, r, d_r, d_z = x + m * m, x + 2 * m * m, x + 3 * m * m, x + 4 * m * m
    _keep(d_z, rows_of(gradient + number * m * m, 0, m, m, m, M, M), m, M)
    _keep(d_a, tl.zeros((M, M), tl.float32), m, M)
    for _ in range(iterations):
        z -= m * m
        _keep(r, _polynomials(a, z, x, q, m, M), m, M)
        _keep(d_r, 0.25 * _product(z, d_z, 1, m, m, 1, m, M), m, M)
        _keep(d_z, 0.25 * _product(d_z, r, m, 1, 1, m, m, M), m, M)
        of_w = _product(x, d_r, 1, m, m, 1, m, M)
        w, d_x = r, d_r
        _keep(w, of_w, m, M)
        of_d_x = 7.0 * of_w - _product(d_r, q, m, 1, 1, m, m, M)
        of_d_x -= _product(x, w, 1, m, m, 1, m, M)
        of_d_x -= _product(w, x, m, 1, 1, m, m, M)
        _keep(d_x, of_d_x, m, M)
        _add(d_a, _product(d_x, z, m, 1, 1, m, m, M), m, M)
        _add(d_z, _product(a, d_x, 1, m, m, 1, m, M), m, M)
    # Z₀ = Aᵀ / s: ∂A = ∂Z₀ᵀ / s, and to the columns whose sum is s, in equal shares, ∂s = -(∂Z₀ · Z₀) / s.
    given = rows_of(a, 0, m, m, m, M, M)
    sums = tl.sum(given, axis=0)
    largest = tl.max(sums, axis=0)
    is_largest = tl.where((sums == largest) & (tl.arange(0, M) < m), 1.0, 0.0)
    d_given = tl.trans(rows_of(d_z, 0, m, m, m, M, M))
    d_largest = -tl.sum(tl.sum(d_given * given, axis=1), axis=0) / (largest * largest)
    _add(d_a, d_given / largest + (is_largest * d_largest / tl.sum(is_largest, axis=0))[None, :], m, M)


def _warps(m: int) -> int:
    return 8 if m > 32 else 4


@torch.library.custom_op("effvit::pseudo_inverse", mutates_args=())
@on_its_device
def invert(a: Tensor, iterations: int) -> Tensor:
    """Matrices ``(..., m, m)`` of float32, m at most 64, as in `kernels.pseudo_inverse`."""
    a, m = a.contiguous(), a.shape[-1]
    z, number = torch.empty_like(a), a.numel() // m**2
    iterate[(number,)](
        a, z, z, a.new_empty(number, 3, m, m), m, iterations, M=side(m), KEEPS=False, num_stages=1, num_warps=_warps(m)
    )
    return z


@invert.register_fake
def _(a: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("effvit::pseudo_inverse_backward", mutates_args=())
@on_its_device
def invert_backward(gradient: Tensor, a: Tensor, iterations: int) -> Tensor:
    """∂A from ∂Z; iterates are computed again."""
    gradient, a, m = gradient.contiguous(), a.contiguous(), a.shape[-1]
    d_a, number = torch.empty_like(a), a.numel() // m**2
    iterates, place = a.new_empty(number, iterations, m, m), a.new_empty(number, 5, m, m)
    iterate[(number,)](a, iterates, d_a, place, m, iterations, M=side(m), KEEPS=True, num_stages=1, num_warps=_warps(m))
    back[(number,)](a, iterates, gradient, d_a, place, m, iterations, M=side(m), num_stages=1, num_warps=_warps(m))
    return d_a


@invert_backward.register_fake
def _(gradient: Tensor, a: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)
