"""Performer: softmax attention estimated by positive orthogonal random features (FAVOR+).

Choromanski et al. 2021 (arXiv 2009.14794, lemma 1 and section 2.4).
"""

from collections.abc import Iterator
from math import e, log2
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.processor import is_amds

_EPS = {"softmax": 1e-6, "relu": 1e-3}
_LOG2_E = log2(e)
_POWERS_OF_TWO_PAY = is_amds()
_BLOCK_NUMBERS = 2**18  # per thread: 1 MiB of float32, as a block needs a handful of such tensors


class PerformerOptions(AttentionOptions):
    """m random features, the kernel they estimate, and every how many training steps they are drawn anew (0 never)."""

    num_features: int = Field(64, ge=1, le=2**16)
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

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens to q, k, v; where that takes fewer products, to Ωq̂, Ωk̂, v and 1 / ‖Ωᵢ‖ ``(m,)``."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if torch.compiler.is_compiling() or not self.folds(len(x), dtype):
            return super().project(x)
        # Ω(W x + b) = (ΩW) x + Ωb: with m = d the folded maps are no larger than the maps.
        w_qk, w_v = self.qkv.weight.split([2 * self.dim, self.dim])
        with torch.autocast(device, enabled=False):  # ΩW is rounded once, as W would be
            omega = self.omega.to(w_qk.dtype) * self.head_dim**-0.25
            weight = torch.cat([(omega @ w_qk.unflatten(0, (-1, self.head_dim))).flatten(0, 1), w_v])
            folded_bias = None
            if self.qkv.bias is not None:
                b_qk, b_v = self.qkv.bias.split([2 * self.dim, self.dim])
                folded_bias = torch.cat([(omega * b_qk.view(-1, 1, self.head_dim)).sum(dim=-1).flatten(), b_v])
        norms = self.omega.to(torch.promote_types(w_qk.dtype, torch.float32)).norm(dim=1)
        return *self.split_maps(x, weight, folded_bias), norms.reciprocal()

    def folds(self, samples: int, dtype: torch.dtype = torch.float32) -> bool:
        """Whether Ω goes into the query and key maps: 2dC² products a batch in place of 2mC a token.

        In bfloat16 for any batch, as a sample's rounding, of Ωk̂ or of k̂, must not depend on it. Never in float16, in
        which Ωk̂ is out of range before k̂ is.
        """
        if self.num_features != self.head_dim or dtype == torch.float16:
            return False
        return dtype == torch.bfloat16 or samples * self.num_tokens > self.dim

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        eps = _EPS[self.kernel] * self.num_features**0.5  # φ below is m^½ φ: the factor cancels
        dtype = torch.promote_types(q.dtype, torch.float32)
        omega: Tensor | None = None  # where it is folded into the maps, q and k are Ωq̂ and Ωk̂
        (scale,) = context or (self.omega.new_tensor(self.head_dim**-0.25, dtype=dtype),)
        if not context:
            omega = self.omega.to(dtype) * scale  # Ωx̂ = (d^-¼ Ω) x: m d numbers are scaled, not N d
        # Blocks are for what exceeds a cache, and a compiler joins the steps by itself.
        whole = torch.compiler.is_compiling() or self.dropout_p  # asked first: an exported batch has no size yet
        if not (whole or (q.device.type == "cpu" and q.numel() <= _BLOCK_NUMBERS)):
            return BlockwiseAttention.apply(q, k, v, omega, scale, self.kernel, eps)
        with torch.autocast(q.device.type, enabled=False):  # φ, its sums over tokens and 1 / them overflow float16
            q, k = q.to(dtype), k.to(dtype)
            h_q, h_k = (x if omega is None else x @ omega.T for x in (q, k))
            phi_q = query_features(h_q, self.kernel) + eps
            phi_k = key_features(h_k, half_norms(k, scale), self.kernel) + eps
            y = F.dropout(phi_q, self.dropout_p) @ (phi_k.transpose(-2, -1) @ v.to(dtype))
            y = y / (phi_q @ phi_k.sum(dim=-2).unsqueeze(-1))
        return y.to(v.dtype)

    def after_step(self, step: int, generator: torch.Generator) -> None:
        if self.training and self.redraw_every and step % self.redraw_every == 0:
            self.omega.copy_(draw_features(self.num_features, self.head_dim, generator))

    def map_macs(self) -> int:
        """4NC², and 2dC² where a single sample's Ω is folded into the maps."""
        return super().map_macs() + (2 * self.head_dim * self.dim**2 if self.folds(1) else 0)

    def mixing_macs(self) -> int:
        """2NmC for context and output, NmH for the normaliser, 2NmC for the features unless folded into the maps."""
        products = 2 if self.folds(1) else 4
        return self.num_tokens * self.num_features * (products * self.dim + self.num_heads)


def query_features(h: Tensor, kernel: str, out: Tensor | None = None) -> Tensor:
    """m^½ (φ(q) - ε) up to a factor of each query, which cancels in the quotient.

    Args:
        h: Ωq̂ of shape ``(..., N, m)``.
        kernel: exp(Ωq̂ - ‖q̂‖² / 2 - c) for ``softmax``, where ‖q̂‖² is such a factor itself and c the largest
            exponent of the query; the part of Ωq̂ above zero for ``relu``.
        out: where to write the result, h itself for instance.
    """
    if kernel == "relu":
        return torch.clamp(h, min=0, out=out)
    # In place, as neither a difference nor a multiple needs its result backward, and 2^x no other.
    return exp_(torch.sub(h, h.detach().amax(dim=-1, keepdim=True), out=out))


def key_features(h: Tensor, half_norms: Tensor, kernel: str, out: Tensor | None = None) -> Tensor:
    """The same for keys, up to one factor for all tokens: c is the largest exponent of all of them.

    A factor that differs between keys would not cancel, so ‖k̂‖² / 2, of shape ``(..., N, 1)``, stays.
    """
    if kernel == "relu":
        return torch.clamp(h, min=0, out=out)
    h = torch.sub(h, half_norms, out=out)
    return exp_(h.sub_(h.detach().amax(dim=(-2, -1), keepdim=True)))


def exp_(x: Tensor) -> Tensor:
    """e^x in place of x; as 2^(x log₂e) where PyTorch's 2^x takes a quarter of the time of its e^x: on AMD's CPUs."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not _POWERS_OF_TWO_PAY:
        return x.exp_()  # compiled it is no slower, and ONNX has no 2^x but the slow power
    return x.mul_(_LOG2_E).exp2_()


def half_norms(x: Tensor, scale: Tensor) -> Tensor:
    """‖k̂‖² / 2 of keys ``(..., N, d)`` with scale d^-¼, or of Ωk̂ ``(..., N, d)`` with scale 1 / ‖Ωᵢ‖ ``(d,)``.

    The d rows of a whole block of Ω are orthogonal: divided by their norms they are a rotation, which keeps norms.
    """
    return (x * scale).square().sum(dim=-1, keepdim=True).mul(0.5)


class BlockwiseAttention(torch.autograd.Function):
    """φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)), one head of a few samples at a time, so that a block stays in a CPU's cache.

    The normaliser D is one more column of the same product: [n, D] = φ(q) S with S = [φ(k)ᵀ v, Σ φ(k)]. Training
    keeps the features, in place of q, and nothing else of their size.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, scale: Tensor, kernel: str, eps: float
    ) -> Tensor:
        y = torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        normaliser = scale.new_empty(*v.shape[:3], 1)
        # Heads first: a product writes a block directly where the block is whole in memory.
        m = q.shape[-1] if omega is None else len(omega)
        shape = (2, q.shape[1], q.shape[0], q.shape[2], m)
        kept = scale.new_empty(shape) if any(ctx.needs_input_grad) else None
        with torch.autocast(q.device.type, enabled=False):  # φ, its sums over tokens and 1 / them overflow float16
            for samples, head in blocks(q):
                block = samples, head
                phi_q, phi_k = scale.new_empty(2, len(q[block]), *shape[3:]) if kept is None else kept[:, head, samples]
                key = k[block].to(scale.dtype)
                h_q, h_k = _exponents(q[block].to(scale.dtype), omega, phi_q), _exponents(key, omega, phi_k)
                query_features(h_q, kernel, out=phi_q).add_(eps)
                key_features(h_k, half_norms(key, scale), kernel, out=phi_k).add_(eps)
                both = torch.bmm(phi_q, _context(phi_k, v[block].to(scale.dtype)))
                normaliser[block] = both[..., -1:]
                torch.div(both[..., :-1], both[..., -1:], out=y[block])
        ctx.save_for_backward(k, v, omega, scale, y, normaliser, kept)
        ctx.kernel, ctx.eps = kernel, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        k, v, omega, scale, y, normaliser, kept = ctx.saved_tensors
        d_q, d_k, d_v = (torch.empty_like(tokens) for tokens in (k, k, v))
        with torch.autocast(k.device.type, enabled=False):
            for samples, head in blocks(k):
                block = samples, head
                phi_q, phi_k = kept[:, head, samples]
                values = v[block].to(scale.dtype)
                # y = n / D: ∂n = ∂y / D and ∂D = -(∂n · y), side by side as n and D are.
                d_both = scale.new_empty(*values.shape[:-1], values.shape[-1] + 1)
                d_n = torch.div(gradient[block], normaliser[block], out=d_both[..., :-1])
                d_both[..., -1] = -(d_n * y[block]).sum(dim=-1)
                d_h = _through_kernel(torch.bmm(d_both, _context(phi_k, values).mT), phi_q, ctx)
                d_q[block] = d_h if omega is None else d_h @ omega
                d_context, d_sum = torch.bmm(phi_q.mT, d_both).split([values.shape[-1], 1], dim=-1)
                d_v[block] = torch.bmm(phi_k, d_context)
                d_h = _through_kernel(torch.baddbmm(d_sum.mT, values, d_context.mT), phi_k, ctx)
                d_key = d_h if omega is None else d_h @ omega
                if ctx.kernel == "softmax":  # the gradient of -‖k̂‖² / 2
                    d_norm = d_h.sum(dim=-1, keepdim=True)
                    d_key.addcmul_(k[block] * scale.square(), d_norm, value=-1)
                d_k[block] = d_key
        return d_q, d_k, d_v, None, None, None, None


def blocks(x: Tensor) -> Iterator[tuple[slice, int]]:
    """Cut ``(B, H, N, d)`` into blocks ``(b, N, d)`` of one head, sized to a CPU's cache; whole on an accelerator."""
    samples, heads, tokens, width = x.shape
    at_once = samples
    if x.device.type == "cpu":
        at_once = max(1, _BLOCK_NUMBERS * torch.get_num_threads() // (tokens * width))
    for sample in range(0, samples, at_once):
        for head in range(heads):
            yield slice(sample, sample + at_once), head


def _exponents(x: Tensor, omega: Tensor | None, out: Tensor) -> Tensor:
    if omega is None:
        return x
    # As a batch of products, which read rows where they lie; one product over all would copy them first.
    return torch.bmm(x, omega.T.expand(len(x), -1, -1), out=out)


def _through_kernel(d_phi: Tensor, phi: Tensor, ctx: Any) -> Tensor:
    """Gradient of φ to that of h, in its place: exp' = exp, relu' = 1 above zero."""
    return d_phi.mul_(phi - ctx.eps if ctx.kernel == "softmax" else phi > ctx.eps)


def _context(phi_k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([torch.bmm(phi_k.mT, v), phi_k.sum(dim=-2).unsqueeze(-1)], dim=-1)


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
