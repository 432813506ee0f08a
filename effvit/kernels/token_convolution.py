"""Depthwise convolution over tokens: each channel by its own kernel, zeros beyond both ends."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from effvit.kernels import choice


def reference(x: Tensor, kernels: Tensor, residual: Tensor | None = None) -> Tensor:
    """y_n = Σ_j w_j x_(n + j - ⌊w/2⌋) of tokens ``(B, N, C)`` with kernels ``(C, w)``: ``(B, N, C)``.

    ``residual``, of the same shape, is added.
    """
    w, n = kernels.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, w // 2, w // 2))
    return _plus(residual, torch.stack([padded[:, j : j + n] * kernels[:, j] for j in range(w)]).sum(dim=0))


def _plus(residual: Tensor | None, y: Tensor) -> Tensor:
    return y if residual is None else residual + y


def as_images(x: Tensor, kernels: Tensor, residual: Tensor | None = None) -> Tensor:
    """By PyTorch's convolution of images."""
    return _plus(residual, convolve(x, kernels))


def with_fast_backward(x: Tensor, kernels: Tensor, residual: Tensor | None = None) -> Tensor:
    """`as_images`, on a CPU."""
    return _plus(residual, FastBackward.apply(x, kernels))


def in_triton(x: Tensor, kernels: Tensor, residual: Tensor | None = None) -> Tensor:
    """By `effvit.kernels.cuda`."""
    return InTriton.apply(x, kernels, residual)


def convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """Tokens as the pixels of an image of one row or one column."""
    channels, w = kernels.shape
    columns = x.transpose(1, 2)  # (B, C, N): channels last in memory, so nothing is copied
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # The columns of an image of one row: up to ten times as fast as the rows of an image of one column.
        y = F.conv2d(columns[:, :, None], kernels[:, None, None], padding=(0, w // 2), groups=channels)[:, :, 0]
    else:  # where oneDNN never returns from some of these images of bfloat16
        y = F.conv2d(columns[..., None], kernels[:, None, :, None], padding=(w // 2, 0), groups=channels)[..., 0]
    return y.transpose(1, 2)


class FastBackward(torch.autograd.Function):
    """`convolve` whose backward pass is as fast: PyTorch's own takes up to eight times as long."""

    @staticmethod
    def forward(x: Tensor, kernels: Tensor) -> Tensor:
        return convolve(x, kernels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernels = ctx.saved_tensors
        (gradient,) = gradients
        channels, w = kernels.shape
        # The transpose of a convolution is the one with the kernel read backwards.
        d_x = convolve(gradient, kernels.flip(1)) if ctx.needs_input_grad[0] else None
        # Sums over all tokens: for these, rows are what is fast.
        rows, d_rows = (tokens.transpose(1, 2)[..., None] for tokens in (x, gradient))
        d_kernels = conv2d_weight(rows, (channels, 1, w, 1), d_rows, padding=(w // 2, 0), groups=channels)
        return d_x, d_kernels[:, 0, :, 0]


class InTriton(torch.autograd.Function):
    """By `effvit.kernels.cuda`, which need no image and no order of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, residual: Tensor | None) -> Tensor:
        from effvit.kernels.cuda.token_convolution import convolution

        ctx.save_for_backward(x, kernels)
        return convolution(x, kernels, residual)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from effvit.kernels.cuda.token_convolution import convolution_backward

        x, kernels = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = tuple(choice.through_equation(reference, (x, kernels), *gradients))
        else:
            found = convolution_backward(*gradients, x, kernels)
        return *found, gradients[0] if ctx.needs_input_grad[2] else None


FORMS = {"as images": as_images, "with fast backward": with_fast_backward}
