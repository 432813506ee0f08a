"""Depthwise convolution over the grid of patches: each channel by its own kernel, zeros beyond the borders."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from effvit.kernels import choice

Grid = tuple[int, int]


def reference(y: Tensor, v: Tensor, kernels: Tensor, grid_size: Grid) -> Tensor:
    """y + Σ_ij K_ij v_(row + i - ⌊w/2⌋, column + j - ⌊w/2⌋) of patches, and y alone of the S tokens before them.

    ``y`` ``(B, S + P, C)``, patches ``v`` ``(B, P, C)``, ``kernels`` ``(C, w, w)``: ``(B, S + P, C)``.
    """
    w, (rows, columns) = kernels.shape[-1], grid_size
    padded = F.pad(v.unflatten(1, grid_size), (0, 0, w // 2, w // 2, w // 2, w // 2))
    parts = [padded[:, i : i + rows, j : j + columns] * kernels[:, i, j] for i in range(w) for j in range(w)]
    return y + F.pad(torch.stack(parts).sum(dim=0).flatten(1, 2), (0, 0, y.shape[1] - v.shape[1], 0))


def as_images(y: Tensor, v: Tensor, kernels: Tensor, grid_size: Grid) -> Tensor:
    """By PyTorch's convolution of images, with channels last in memory, so that nothing is turned around."""
    return y + F.pad(convolve(v, kernels, grid_size), (0, 0, y.shape[1] - v.shape[1], 0))


def convolve(v: Tensor, kernels: Tensor, grid_size: Grid) -> Tensor:
    """Patches ``(B, P, C)`` to patches."""
    w = kernels.shape[-1]
    images = F.conv2d(_images(v, grid_size), kernels[:, None], padding=w // 2, groups=kernels.shape[0])
    return images.flatten(2).transpose(1, 2)


def in_few_passes(y: Tensor, v: Tensor, kernels: Tensor, grid_size: Grid) -> Tensor:
    """`as_images`, on a CPU."""
    return FewPasses.apply(y, v, kernels, grid_size)


class FewPasses(torch.autograd.Function):
    """`as_images` with one pass for the sum, and a backward pass of two convolutions and nothing else."""

    @staticmethod
    def forward(y: Tensor, v: Tensor, kernels: Tensor, grid_size: Grid) -> Tensor:
        out, prefix = torch.empty_like(y), y.shape[1] - v.shape[1]
        out[:, :prefix] = y[:, :prefix]
        torch.add(y[:, prefix:], convolve(v, kernels, grid_size), out=out[:, prefix:])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, v, kernels, ctx.grid_size = inputs
        ctx.save_for_backward(v, kernels)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, kernels = ctx.saved_tensors
        (gradient,) = gradients
        of_patches = gradient[:, gradient.shape[1] - v.shape[1] :]
        # The transpose of a convolution is the one with the kernel turned around.
        d_v = convolve(of_patches, kernels.flip(1, 2), ctx.grid_size) if ctx.needs_input_grad[1] else None
        w = kernels.shape[-1]
        images = _images(v, ctx.grid_size), _images(of_patches, ctx.grid_size)
        shape = (len(kernels), 1, w, w)
        d_kernels = conv2d_weight(images[0], shape, images[1], padding=w // 2, groups=kernels.shape[0])
        return gradient, d_v, d_kernels[:, 0], None


def _images(v: Tensor, grid_size: Grid) -> Tensor:
    return v.transpose(1, 2).unflatten(2, grid_size)


FORMS = {"as images": as_images, "in few passes": in_few_passes}
