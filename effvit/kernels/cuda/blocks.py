"""What all kernels here share: blocks of tokens, and how products round."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit import policy


@triton.jit
def rows_of(start, first, stride, number, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``first`` to ``first + ROWS`` of ``(number, width)`` in float32, with zeros outside."""
    rows, columns = first + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = start + rows.to(tl.int64) * stride + columns
    return tl.load(at, mask=(rows < number) & (columns < width), other=0.0).to(tl.float32)


@triton.jit
def store_rows(start, first, stride, number, width, x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write such rows, rounded to the precision of that memory."""
    rows, columns = first + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = start + rows.to(tl.int64) * stride + columns
    tl.store(at, x.to(start.dtype.element_ty), mask=(rows < number) & (columns < width))


@triton.jit
def product(a, b, EXACT: tl.constexpr):
    """a b, with factors rounded to TF32 (10 bits), or as exact as in float32.

    That is three products of the parts a = a₁ + a₂ that TF32 holds. Triton's own, ``tf32x3``, takes the parts where
    factors have been dealt to warps, which hold copies of one another's, and runs out of registers.
    """
    if EXACT:
        a_1, b_1 = _ten_bits(a), _ten_bits(b)
        y = tl.dot(a - a_1, b_1, input_precision="tf32")
        y = tl.dot(a_1, b - b_1, y, input_precision="tf32")
        y = tl.dot(a_1, b_1, y, input_precision="tf32")
    else:
        y = tl.dot(a, b, input_precision="tf32")
    return y


@triton.jit
def _ten_bits(x):
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)  # 13 of 23 bits are rest


def side(width: int) -> int:
    """The side of a block that takes this many columns: products need a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(width))


def is_exact(*factors: Tensor) -> bool:
    """Whether products are to be as exact as in float32: of such factors, where PyTorch's may not round to TF32."""
    return torch.float32 in [x.dtype for x in factors] and not policy.rounds_products()


def on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Launch kernels on the GPU of the first tensor, which need not be the current one."""

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return operator(*args, **kwargs)

    return call


def by_rows(x: Tensor) -> Tensor:
    """``x`` with the numbers of a row next to one another in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like_heads(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """New memory for tokens ``(B, H, N, width)``, in which a token's heads are next to one another."""
    samples, heads, number, _ = x.shape
    return x.new_empty(samples, number, heads, width, dtype=dtype).transpose(1, 2)
