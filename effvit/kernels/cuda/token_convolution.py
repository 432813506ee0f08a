"""Depthwise convolution over tokens, and its two transposes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import by_rows, on_its_device, rows_of, store_rows

_ROWS = 64  # tokens per program
_SUMMED = 512  # tokens that a program sums over
_CHANNELS = 32


@triton.jit
def convolve(
    x, kernels, residual, y, x_b, x_n, r_b, r_n, y_b, y_n, k_c, k_w, number, channels, w, first, step, parts, blocks,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y_n = r_n + Σ_j w_j x_(n + first + step j) of some tokens and channels, with zeros beyond both ends."""
    part, sample = tl.program_id(0) % parts, tl.program_id(0) // parts
    start, channel = part // blocks * ROWS, part % blocks * CHANNELS
    rows, columns = tl.arange(0, ROWS)[:, None], channel + tl.arange(0, CHANNELS)
    x += sample.to(tl.int64) * x_b
    y += sample.to(tl.int64) * y_b
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for j in range(w):
        row = start + rows + first + step * j
        inside = (row >= 0) & (row < number) & (columns < channels)[None, :]
        value = tl.load(x + row.to(tl.int64) * x_n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(kernels + columns * k_c + j * k_w, mask=columns < channels, other=0.0).to(tl.float32)
        total += value * factor[None, :]
    if RESIDUAL:
        residual += sample.to(tl.int64) * r_b
        total += rows_of(residual + channel, start, r_n, number, channels - channel, ROWS, CHANNELS)
    store_rows(y + channel, start, y_n, number, channels - channel, total, ROWS, CHANNELS)


@triton.jit
def correlate(
    x, gradient, sums, x_b, x_n, g_b, g_n, number, channels, w, parts, blocks, lags,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, LAGS: tl.constexpr,
):  # fmt: skip
    """Σ_n ∂y_n x_(n + j - ⌊w/2⌋) over a part of a sample's tokens, of some channels and some j: ``(C, w)``."""
    lag = tl.program_id(0) % lags * LAGS + tl.arange(0, LAGS)
    block = tl.program_id(0) // lags % blocks
    part = tl.program_id(0) // (lags * blocks)
    sample, first = (part // parts).to(tl.int64), part % parts * LENGTH
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    x += sample * x_b
    gradient += sample * g_b + first.to(tl.int64) * g_n
    total = tl.zeros((LAGS, CHANNELS), tl.float32)
    for n in range(first, tl.minimum(first + LENGTH, number)):
        factor = tl.load(gradient + columns, mask=columns < channels, other=0.0).to(tl.float32)
        row = (n + lag - w // 2)[:, None]
        inside = (row >= 0) & (row < number) & (lag < w)[:, None] & (columns < channels)[None, :]
        value = tl.load(x + row.to(tl.int64) * x_n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += value * factor[None, :]
        gradient += g_n
    at = sums + part.to(tl.int64) * channels * w + columns[None, :] * w + lag[:, None]
    tl.store(at, total, mask=(lag < w)[:, None] & (columns < channels)[None, :])


def _convolve(x: Tensor, kernels: Tensor, first: int, step: int, residual: Tensor | None = None) -> Tensor:
    samples, number, channels = x.shape
    x, y = by_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    added = x if residual is None else by_rows(residual)
    blocks = triton.cdiv(channels, _CHANNELS)
    parts = triton.cdiv(number, _ROWS) * blocks
    convolve[(samples * parts,)](
        *(x, kernels, added, y, *x.stride()[:2], *added.stride()[:2], *y.stride()[:2], *kernels.stride()),
        *(number, channels, kernels.shape[1], first, step, parts, blocks),
        RESIDUAL=residual is not None,
        ROWS=_ROWS,
        CHANNELS=_CHANNELS,
    )
    return y


@torch.library.custom_op("effvit::token_convolution", mutates_args=())
@on_its_device
def convolution(x: Tensor, kernels: Tensor, residual: Tensor | None) -> Tensor:
    """Tokens ``(B, N, C)`` with kernels ``(C, w)``, plus ``residual``, as in `kernels.token_convolution`."""
    return _convolve(x, kernels, -(kernels.shape[1] // 2), 1, residual)


@convolution.register_fake
def _(x: Tensor, kernels: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("effvit::token_convolution_backward", mutates_args=())
@on_its_device
def convolution_backward(gradient: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and kernels. Sums over parts of samples, which are then summed in their order."""
    w = kernels.shape[1]
    gradient, x = by_rows(gradient), by_rows(x)
    d_x = _convolve(gradient, kernels, w // 2, -1)
    samples, number, channels = x.shape
    parts, blocks = triton.cdiv(number, _SUMMED), triton.cdiv(channels, _CHANNELS)
    side = min(64, max(16, triton.next_power_of_2(w)))
    lags = triton.cdiv(w, side)
    sums = x.new_empty(samples * parts, channels, w, dtype=torch.float32)
    correlate[(samples * parts * blocks * lags,)](
        *(x, gradient, sums, *x.stride()[:2], *gradient.stride()[:2]),
        *(number, channels, w, parts, blocks, lags),
        LENGTH=_SUMMED,
        CHANNELS=_CHANNELS,
        LAGS=side,
    )
    return d_x, sums.sum(dim=0).to(kernels.dtype)


@convolution_backward.register_fake
def _(gradient: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape)
