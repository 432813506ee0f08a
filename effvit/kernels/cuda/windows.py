"""Which patches are in a window, and the softmax over them and the prefix tokens; what both passes share."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import is_exact, product, side

MOST_PATCHES, MOST_PREFIX, WIDEST = 64, 16, 64
"""Patches of a window, prefix tokens, and columns of a head's queries or values."""

STRIP = tl.constexpr(16)
"""Queries at a time: with those of a whole window, scores and their gradients would not fit into registers."""

COLUMNS = 32
"""Columns that some kernels multiply at a time, as found by compiling them: with more they run out of registers."""

_ALONE = 8  # patches a side that a program takes where heads have no windows
_LOWEST = tl.constexpr(-1e38)
"""Taken for the largest of no numbers, so that e to the others, -inf, is 0."""


class Run(NamedTuple):
    """Neighbouring heads with equal windows, and the arguments of their kernels."""

    heads: slice
    mixes: bool
    """Whether their patches attend; in heads without windows only prefix tokens do."""
    number: int
    arguments: tuple[int, ...]


def runs_of(windows: Sequence[int], heads: int) -> Iterator[Run]:
    """Heads, rows, columns, w, dilation and shift of each run in turn; then heads without windows."""
    first, rows, columns = 0, *windows[1:3]
    for start in range(0, len(windows), 6):
        number, *window = windows[start : start + 6]
        yield _run(first, number, True, *window)
        first += number
    if first < heads:
        yield _run(first, heads - first, False, rows, columns, _ALONE, 1, 0)


def _run(first: int, heads: int, mixes: bool, rows: int, columns: int, size: int, dilation: int, shift: int) -> Run:
    before = size - shift if shift else 0  # rows and columns by which the first window hangs over the grid
    down, across = ((triton.cdiv(length, dilation) - 1 + before) // size + 1 for length in (rows, columns))
    number = down * across * dilation**2
    arguments = (heads, number, rows, columns, size, dilation, before, down, across)
    return Run(slice(first, first + heads), mixes, number, arguments)


def options_of(run: Run, prefix: int, asks: bool, *tensors: Tensor) -> dict[str, Any]:
    """How kernels are compiled for queries, keys and values, of which prefix tokens may be and may ask."""
    q, _, v = tensors
    patches = side(run.arguments[4] ** 2)
    return {
        "MIXES": run.mixes,
        "PREFIX": prefix > 0,
        "ASKS": asks and prefix > 0,
        "EXACT": is_exact(*tensors),
        "W": patches,
        "S": MOST_PREFIX,
        "D": side(q.shape[-1]),
        "E": side(v.shape[-1]),
        "num_warps": 8 if patches > 32 or is_exact(*tensors) else 4,
        "num_stages": 1,
    }


def prefix_of(k: Tensor, windows: Sequence[int]) -> int:
    """Prefix tokens among keys."""
    return k.shape[2] - windows[1] * windows[2]


@triton.jit
def place(program, heads, number):
    """Sample, head and window of a program: heads of a token lie next to one another."""
    return (program // heads // number).to(tl.int64), program % heads, program // heads % number


@triton.jit
def patches_of(window, start, rows, columns, size, dilation, before, down, across, W: tl.constexpr):
    """Numbers in the grid of W patches of a window, and whether they are there."""
    place, phase = window // (dilation * dilation), window % (dilation * dilation)
    i = start + tl.arange(0, W)
    of_row = place // across * size + i // size - before
    of_column = place % across * size + i % size - before
    row, column = of_row * dilation + phase // dilation, of_column * dilation + phase % dilation
    there = (i < size * size) & (of_row >= 0) & (row < rows) & (of_column >= 0) & (column < columns)
    return row * columns + column, there


@triton.jit
def rows_at(start, tokens, there, stride, width, WIDTH: tl.constexpr):
    """Rows of these tokens in float32, with zeros for what is not there."""
    columns = tl.arange(0, WIDTH)[None, :]
    at = start + (tokens[:, None] * stride + columns)  # offsets of 64 bits would take too many registers
    return tl.load(at, mask=there[:, None] & (columns < width), other=0.0).to(tl.float32)


@triton.jit
def store_at(start, tokens, there, stride, width, x, WIDTH: tl.constexpr):
    """Write such rows, rounded to the precision of that memory."""
    columns = tl.arange(0, WIDTH)[None, :]
    at = start + (tokens[:, None] * stride + columns)  # offsets of 64 bits would take too many registers
    tl.store(at, x.to(start.dtype.element_ty), mask=there[:, None] & (columns < width))


@triton.jit
def products_of(
    a, b, of_a, of_b, in_a, in_b, a_n, b_n, width,
    EXACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A Bᵀ of rows of these tokens, over so many columns at a time."""
    y = tl.zeros((A, B), tl.float32)
    for column in range(0, width, AT_ONCE):
        rows = rows_at(a + column, of_a, in_a, a_n, width - column, AT_ONCE)
        y += product(rows, tl.trans(rows_at(b + column, of_b, in_b, b_n, width - column, AT_ONCE)), EXACT)
    return y


@triton.jit
def scores_of(
    q, k, of_q, of_k, in_q, in_k, q_n, k_n, d, scale,
    EXACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Scores of queries and keys of these tokens, -inf where there is no key."""
    scores = scale * products_of(q, k, of_q, of_k, in_q, in_k, q_n, k_n, d, EXACT, A, B, AT_ONCE)
    return tl.where(in_k[None, :], scores, float("-inf"))


@triton.jit
def largest_of(scores):
    """The largest score of each query, a finite number."""
    return tl.maximum(tl.max(scores, axis=1), _LOWEST)


def no_tensor(x: Tensor) -> Tensor:
    """For a kernel that will not look at it."""
    return x.new_empty(0, dtype=torch.float32)
