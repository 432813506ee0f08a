"""Performer: softmax attention estimated by positive orthogonal random features (FAVOR+).

Choromanski et al. 2021 (arXiv 2009.14794, lemma 1 and section 2.4).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from effvit.attention.base import Attention, AttentionOptions, Grid, register

_EPS = {"softmax": 1e-6, "relu": 1e-3}


class PerformerOptions(AttentionOptions):
    """m random features, the kernel they estimate, and every how many training steps they are drawn anew (0 never)."""

    num_features: int = Field(64, ge=1)
    kernel: Literal["softmax", "relu"] = "softmax"
    redraw_every: int = Field(1000, ge=0)


@register
class PerformerAttention(Attention):
    """φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)), with Ω in the state dict. Dropout acts on φ(q)."""

    Options = PerformerOptions
    complexity = "O(N m)"
    paper = "Choromanski et al. 2021, arXiv 2009.14794"
    omega: Tensor

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: PerformerOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.num_features, self.kernel = options.num_features, options.kernel
        self.redraw_every = options.redraw_every
        self.register_buffer("omega", draw_features(self.num_features, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # φ, its sums over tokens and 1 / them overflow float16
            phi_q, phi_k = self.features(q, over_tokens=False), self.features(k, over_tokens=True)
            normaliser = phi_q @ phi_k.sum(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
            phi_q = F.dropout(phi_q / normaliser, self.dropout_p)
            y = phi_q @ (phi_k.transpose(-2, -1) @ v.to(phi_k.dtype))
        return y.to(v.dtype)

    def features(self, x: Tensor, over_tokens: bool) -> Tensor:
        """φ(x): ``(B, H, N, d)`` to positive features ``(B, H, N, m)``, in float32 at least.

        ``over_tokens`` says over what the exponent's maximum is taken: it must be one constant for all keys of a
        sample and head to cancel in the quotient, while each query may have its own.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
        h = x @ self.omega.to(x.dtype).T
        if self.kernel == "relu":
            return F.relu(h).add(_EPS["relu"] * self.num_features**0.5) * self.num_features**-0.5
        exponent = h - 0.5 * x.square().sum(dim=-1, keepdim=True)
        maximum = exponent.detach().amax(dim=(-2, -1) if over_tokens else -1, keepdim=True)
        return (exponent - maximum).exp() * self.num_features**-0.5 + _EPS["softmax"]

    def after_step(self, step: int, generator: torch.Generator) -> None:
        if self.training and self.redraw_every and step % self.redraw_every == 0:
            self.omega.copy_(draw_features(self.num_features, self.head_dim, generator))

    def mixing_macs(self) -> int:
        """4NmC for features, context and output, NmH for the normaliser."""
        return self.num_tokens * self.num_features * (4 * self.dim + self.num_heads)


def draw_features(num_features: int, head_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Ω of shape ``(m, d)``: rows of random rotations, stacked block by block, with the norms of Gaussian vectors."""
    blocks = []
    for _ in range(-(-num_features // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
        rotation, r = torch.linalg.qr(gaussian)
        # QR is unique, and Q Haar-distributed, only with a positive diagonal of R (Mezzadri 2007).
        blocks.append((rotation * r.diagonal().sign()).T)
    norms = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:num_features] * norms).float()
