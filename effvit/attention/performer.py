"""Performer: softmax attention estimated by positive orthogonal random features (FAVOR+).

Choromanski et al. 2021 (arXiv 2009.14794, lemma 1 and section 2.4).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.kernels.choice import is_plain, on_cpu
from effvit.kernels.feature_attention import Features, feature_attention
from effvit.kernels.qkv import qkv

_EPS = {"softmax": 1e-6, "relu": 1e-3}
_LAST_DRAW = 0.8  # of a run: after that the learning rate is too low for the weights to follow


class PerformerOptions(AttentionOptions):
    """m random features, the kernel they estimate, and every how many training steps they are drawn anew.

    0: never. In the last fifth of a run none are drawn.
    """

    num_features: int = Field(32, ge=1, le=2**16)
    kernel: Literal["softmax", "relu"] = "softmax"
    redraw_every: int = Field(1000, ge=0)


@register
class PerformerAttention(Attention):
    """φ(q̂) (φ(k̂)ᵀ v) / (φ(q̂) · Σ φ(k̂)) with x̂ = d^-¼ x and Ω ``(m, d)``. Dropout acts on φ(q̂).

    - ``softmax``: φ(x) = m^-½ exp(Ωx - ‖x‖² / 2 - c) + ε; c is the largest exponent of a query, or of all keys
    - ``relu``: φ(x) = m^-½ max(Ωx, 0) + ε
    """

    Options = PerformerOptions
    complexity = "O(N m)"
    paper = "Choromanski et al. 2021, arXiv 2009.14794"
    omega: Tensor

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: PerformerOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.num_features, self.kernel = options.num_features, options.kernel
        self.redraw_every = options.redraw_every
        self.register_buffer("omega", draw_features(self.num_features, self.head_dim).to(torch.empty(0).device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        return feature_attention(q, k, v, self.features(*context), self.dropout_p)

    def features(self, scale: Tensor | None = None) -> Features:
        """φ up to the factor m^-½, which cancels; with the ``scale`` that `fold` gives, φ of Ωx̂ in place of x."""
        kernel: Literal["exp", "relu"] = "exp" if self.kernel == "softmax" else "relu"
        eps = _EPS[self.kernel] * self.num_features**0.5
        if scale is not None:
            return Features(kernel, eps, None, scale)
        return Features(kernel, eps, self.omega, self.head_dim**-0.25)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.fold(x) if self.folds(x) else super().project(x)

    def folds(self, x: Tensor) -> bool:
        """Whether Ω goes into the query and key maps: 2dC² products a batch in place of 2mC a token.

        In bfloat16 for any batch, as a sample's rounding, of Ωk̂ or of k̂, must not depend on it. Never in float16, in
        which Ωk̂ is out of range before k̂ is.
        """
        if self.num_features != self.head_dim or not (on_cpu(x) and is_plain(self.qkv)):
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return dtype == torch.bfloat16 or (dtype != torch.float16 and x.shape[0] * x.shape[1] > self.dim)

    def fold(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens to Ωq̂, Ωk̂, v and 1 / ‖Ωᵢ‖ ``(m,)``: Ω(W x + b) = (ΩW) x + Ωb.

        The d rows of a whole block of Ω are orthogonal: divided by their norms they are a rotation, which keeps norms.
        """
        w_qk, w_v = self.qkv.weight.split([2 * self.dim, self.dim])
        with torch.autocast("cpu", enabled=False):  # ΩW is rounded once, as W would be
            omega = self.omega.to(w_qk.dtype) * self.head_dim**-0.25
            weight = torch.cat([(omega @ w_qk.unflatten(0, (-1, self.head_dim))).flatten(0, 1), w_v])
            bias: Tensor | None = None
            if self.qkv.bias is not None:
                b_qk, b_v = self.qkv.bias.split([2 * self.dim, self.dim])
                bias = torch.cat([(omega * b_qk.view(-1, 1, self.head_dim)).sum(dim=-1).flatten(), b_v])
        norms = self.omega.to(torch.promote_types(w_qk.dtype, torch.float32)).norm(dim=1)
        return *map(self.split_heads, qkv(x, weight, bias)), norms.reciprocal()

    def after_step(self, step: int, generator: torch.Generator, steps: int | None = None) -> None:
        settled = steps is not None and step > _LAST_DRAW * steps
        if self.training and self.redraw_every and step % self.redraw_every == 0 and not settled:
            self.omega.copy_(draw_features(self.num_features, self.head_dim, generator))

    def mixing_macs(self) -> int:
        """4NmC for features, context and output, NmH for the normaliser."""
        return self.num_tokens * self.num_features * (4 * self.dim + self.num_heads)


def draw_features(num_features: int, head_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Ω of shape ``(m, d)``: rows of random rotations, stacked block by block, with the norms of Gaussian vectors."""
    with torch.device("cpu"):  # where generators and float64 are, whatever the default device
        blocks = []
        for _ in range(-(-num_features // head_dim)):
            gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
            rotation, r = torch.linalg.qr(gaussian)
            # QR is unique, and Q Haar-distributed, only with a positive diagonal of R (Mezzadri 2007).
            blocks.append((rotation * r.diagonal().sign()).T)
        norms = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        return (torch.cat(blocks)[:num_features] * norms).float()
