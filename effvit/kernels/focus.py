"""Focused features: rows turned to their nearest axes by a power, at the norm that they have."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effvit.kernels import choice

EPS = 1e-6  # so that no row is zero
_BLOCK_NUMBERS = 2**16  # per thread: 256 KiB of float32, as a block needs a handful of such tensors


def reference(x: Tensor, scale: Tensor, power: float) -> Tensor:
    """φ(x) = ‖x̂‖ x̂ᵖ / ‖x̂ᵖ‖ with x̂ = (relu(x) + ε) / scale, of rows ``(B, H, N, d)``: the same shape, float32 or more.

    ``scale`` is of shape ``(H, 1, d)``.
    """
    with choice.without_autocast(x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_hat = (x.to(dtype).relu() + EPS) / scale.to(dtype)
        powers = (x_hat / x_hat.detach().amax(dim=-1, keepdim=True)).pow(power)  # at most 1: φ is the same
        return powers * (_norm(x_hat) / _norm(powers))


def by_blocks(x: Tensor, scale: Tensor, power: float) -> Tensor:
    """A few tokens at a time, which stay in a CPU's cache; on a GPU all at once, for the sake of fewer passes."""
    return Blockwise.apply(x, scale, power)


class Blockwise(torch.autograd.Function):
    """With t = ∂φ · φ / ‖x̂‖²: ∂x̂ = x̂ t + p (φ / x̂) (∂φ - φ t), which needs no power again; ∂scale = -Σ ∂x̂ x̂ / scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, power: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        samples, heads, tokens, d = x.shape
        phi = x.new_empty(samples, tokens, heads, d, dtype=dtype)
        factor = scale.to(dtype).reciprocal().squeeze(1)  # (H, d)
        for rows, out in _blocks(x.transpose(1, 2), phi):
            x_hat = _scaled(rows, factor)
            norm = _norm(x_hat)
            powers = torch.pow(x_hat.div_(x_hat.amax(dim=-1, keepdim=True)), power, out=out)
            powers.mul_(norm.div_(_norm(powers)))
        ctx.save_for_backward(x, scale, phi)
        ctx.power = power
        return phi.transpose(1, 2)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, phi = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients: through the equation
            inputs = [tensor for tensor in (x, scale) if tensor.requires_grad]
            found = iter(torch.autograd.grad(reference(x, scale, ctx.power), inputs, gradient, create_graph=True))
            return *(next(found) if tensor.requires_grad else None for tensor in (x, scale)), None
        d_x = x.new_empty(phi.shape)
        factor = scale.to(phi.dtype).reciprocal().squeeze(1)
        d_scale = torch.zeros_like(factor)
        for rows, of_phi, d_phi, out in _blocks(x.transpose(1, 2), phi, gradient.transpose(1, 2), d_x):
            x_hat = _scaled(rows, factor)
            t = (d_phi * of_phi).sum(dim=-1, keepdim=True).div_(x_hat.square().sum(dim=-1, keepdim=True))
            turned = torch.addcmul(d_phi, of_phi, t, value=-1).mul_(of_phi).div_(x_hat).mul_(ctx.power)
            d_x_hat = turned.addcmul_(x_hat, t)
            d_scale -= (d_x_hat * x_hat).sum(dim=0)
            torch.mul(d_x_hat.mul_(factor), rows > 0, out=out)
        d_scale = (d_scale * factor).unsqueeze(1).to(scale.dtype)
        return d_x.transpose(1, 2), d_scale, None


def _blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Cut tensors ``(B, N, H, d)``, of which those to write are whole in memory, into blocks ``(n, H, d)``."""
    rows = [tensor.flatten(0, 1) for tensor in tensors]
    if rows[0].device.type != "cpu":
        yield rows
        return
    at_once = max(1, _BLOCK_NUMBERS * torch.get_num_threads() // rows[0].shape[1:].numel())
    for first in range(0, len(rows[0]), at_once):
        yield [each[first : first + at_once] for each in rows]


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """x̂ of rows ``(n, H, d)``."""
    return rows.clamp(min=0).to(factor.dtype).add_(EPS).mul_(factor)


def _norm(x: Tensor) -> Tensor:
    if x.device.type == "cuda":  # one pass
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.square().sum(dim=-1, keepdim=True).sqrt()


FORMS = {"by blocks": by_blocks}
