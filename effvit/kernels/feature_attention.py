"""Attention through features of queries and keys: φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k))."""

from collections.abc import Iterator
from math import e, log2
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit import policy
from effvit.kernels import choice, focus

_LOG2_E = log2(e)
BLOCK_NUMBERS = 2**18  # per thread: 1 MiB of float32, as a block needs a handful of such tensors


class Features(NamedTuple):
    """φ: how rows ``(..., d)`` become features ``(..., m)``, with h = Ω (s x), or x where there is no Ω ``(m, d)``.

    - ``exp``: exp(h - c) + ε for queries, exp(h - ‖s x‖² / 2 - c) + ε for keys, with s a number or ``(d,)``; c is the
      largest exponent, of each query by itself, of all keys of a head together, so that it cancels.
    - ``relu``: max(h, 0) + ε.
    - ``elu``: elu(h) + 1 + ε.
    - ``softmax``: softmax over a query's features; for keys, over the tokens of each feature. The normaliser is then 1.
    - ``identity``: h, which must be positive.
    - ``focused``: `effvit.kernels.focus` of x, with s of shape ``(H, 1, d)`` and ``power``.
    """

    kernel: Literal["exp", "relu", "elu", "softmax", "identity", "focused"]
    eps: float
    omega: Tensor | None = None
    scale: Tensor | float = 1.0
    power: float = 1.0

    def of_queries(self, q: Tensor) -> Tensor:
        """φ(q), for ``exp`` up to a factor of each query, which cancels in the quotient."""
        if self.kernel == "focused":
            return focus.reference(q, *self.scale_and_power())
        h = q if self.omega is None else q @ self.matrix(q.dtype).mT
        if self.kernel == "softmax":
            return h.softmax(dim=-1)
        return self._positive(h, dims=(-1,)) + self.eps

    def of_keys(self, k: Tensor) -> Tensor:
        """φ(k), for ``exp`` up to a factor common to all keys of a head."""
        if self.kernel == "focused":
            return focus.reference(k, *self.scale_and_power())
        h = k if self.omega is None else k @ self.matrix(k.dtype).mT
        if self.kernel == "softmax":
            return h.softmax(dim=-2)
        if self.kernel == "exp":
            h = h - half_norms(k, self.scale)
        return self._positive(h, dims=(-2, -1)) + self.eps

    def scale_and_power(self) -> tuple[Tensor, float]:
        """Of ``focused``, as `effvit.kernels.focus` takes them."""
        assert isinstance(self.scale, Tensor), "of columns"
        return self.scale, self.power

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """s Ω ``(m, d)``, so that m d numbers are scaled and not N d."""
        assert self.omega is not None, "h is x"
        return self.omega.to(dtype) * self.scale

    def _positive(self, h: Tensor, dims: tuple[int, ...]) -> Tensor:
        if self.kernel == "exp":
            return exp_(h - h.detach().amax(dim=dims, keepdim=True))
        if self.kernel == "relu":
            return h.relu()
        if self.kernel == "identity":
            return h
        # elu + 1 is exp(x) below 0 and x + 1 above. Adding 1 to elu's -1 + exp(x) would round exp(x) away.
        return h.clamp(max=0).exp() + h.relu()


def reference(q: Tensor, k: Tensor, v: Tensor, features: Features, dropout_p: float = 0.0) -> Tensor:
    """Queries ``(B, H, M, d)``, keys ``(B, H, N, d)`` and values ``(B, H, N, e)`` to ``(B, H, M, e)``.

    Dropout acts on φ(q), not on the normaliser.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with choice.without_autocast(q):  # φ, its sums over tokens and 1 / them overflow float16
        phi_q, phi_k = features.of_queries(q.to(dtype)), features.of_keys(k.to(dtype))
        y = F.dropout(phi_q, dropout_p) @ (phi_k.mT @ v.to(dtype))
        if features.kernel == "softmax":
            return y.to(v.dtype)
        return (y / (phi_q @ phi_k.sum(dim=-2).unsqueeze(-1))).to(v.dtype)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, features: Features, dropout_p: float = 0.0) -> Tensor:
    """One head of a few samples at a time, which stay in a CPU's cache. Without dropout."""
    assert not dropout_p, "no form with dropout"
    return Blockwise.apply(q, k, v, features)


def half_norms(x: Tensor, scale: Tensor | float) -> Tensor:
    """‖s x‖² / 2 of rows ``(..., d)``: ``(..., 1)``."""
    return (x * scale).square().sum(dim=-1, keepdim=True).mul(0.5)


def exp_(x: Tensor) -> Tensor:
    """e^x in place of x, as 2^(x log₂e) where that is faster."""
    # Compiled it is no slower, and ONNX has no 2^x but the slow power.
    return x.mul_(_LOG2_E).exp2_() if policy.POWERS_OF_TWO and choice.on_cpu(x) else x.exp_()


class Blockwise(torch.autograd.Function):
    """The normaliser D is one more column of the same product: [n, D] = φ(q) S with S = [φ(k)ᵀ v, Σ φ(k)].

    With ``softmax``, of which φ are the exponentials alone, S = [φ(k)ᵀ v / Σ φ(k), 1]. Training keeps q and φ(k), and
    nothing else of their size; φ(q) is computed again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: Features) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        samples, heads, rows, d = q.shape
        columns, m = k.shape[2], d if features.omega is None else len(features.omega)
        y = v.new_empty(samples, rows, heads, v.shape[-1]).transpose(1, 2)
        normaliser = q.new_empty(samples, heads, rows, 1, dtype=dtype)
        # Heads first: a product writes a block directly where the block is whole in memory.
        keeps = any(ctx.needs_input_grad) and features.kernel != "identity"
        kept = q.new_empty(heads, samples, columns, m, dtype=dtype) if keeps else None
        with choice.without_autocast(q):
            for block in _blocks(k):
                query, key, value = (tokens[block].to(dtype) for tokens in (q, k, v))
                phi_q = _of_queries(query, features)
                place = q.new_empty(len(key), columns, m, dtype=dtype) if kept is None else kept[block[::-1]]
                phi_k = _of_keys(key, features, place)
                both = torch.bmm(phi_q, _context(phi_k, value, features))
                normaliser[block] = both[..., -1:]
                torch.div(both[..., :-1], both[..., -1:], out=y[block])
        scale = features.scale if isinstance(features.scale, Tensor) else None
        ctx.save_for_backward(q, k, v, features.omega, scale, y, normaliser, kept)
        ctx.features = features._replace(omega=None, scale=1.0 if scale is not None else features.scale)
        return y

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        q, k, v, omega, scale, y, normaliser, kept = ctx.saved_tensors
        features: Features = ctx.features._replace(omega=omega, scale=ctx.features.scale if scale is None else scale)
        if torch.is_grad_enabled():
            return *choice.through_equation(lambda q, k, v: reference(q, k, v, features), (q, k, v), gradient), None
        d_q, d_k, d_v = (torch.empty_like(tokens) for tokens in (q, k, v))
        with choice.without_autocast(k):
            for block in _blocks(k):
                query, key, value = (tokens[block].to(normaliser.dtype) for tokens in (q, k, v))
                d_y, phi_k = (gradient[block], y[block], normaliser[block]), key if kept is None else kept[block[::-1]]
                context = _context(phi_k, value, features)
                d_q[block], d_context = _through_queries(query, context, d_y, features)
                if features.kernel == "softmax":
                    d_context = _through_quotient(d_context, context, phi_k)
                d_k[block], d_v[block] = _through_keys(key, value, phi_k, d_context, features)
        return d_q, d_k, d_v, None


def _blocks(x: Tensor) -> Iterator[tuple[slice, int]]:
    """Cut ``(B, H, N, d)`` into blocks ``(b, N, d)`` of one head, sized to a CPU's cache."""
    samples, heads, tokens, width = x.shape
    at_once = max(1, BLOCK_NUMBERS * torch.get_num_threads() // (tokens * width))
    for sample in range(0, samples, at_once):
        for head in range(heads):
            yield slice(sample, sample + at_once), head


def _of_queries(q: Tensor, features: Features) -> Tensor:
    """`Features.of_queries` of a block ``(b, N, d)``, in one piece of memory."""
    h = _products(q, features)
    return _positive_(h, None if h is q else h, features, dims=(-1,))


def _of_keys(k: Tensor, features: Features, out: Tensor) -> Tensor:
    """`Features.of_keys` of a block ``(b, N, d)``, written to ``out``."""
    h = _products(k, features, out)
    if features.kernel == "exp":
        h = torch.sub(h, half_norms(k, features.scale), out=out)
    return _positive_(h, out, features, dims=(-2,) if features.kernel == "softmax" else (-2, -1))


def _products(x: Tensor, features: Features, out: Tensor | None = None) -> Tensor:
    if features.omega is None:
        return x
    # As a batch of products, which read rows where they lie; one product over all would copy them first.
    return torch.bmm(x, features.matrix(x.dtype).T.expand(len(x), -1, -1), out=out)


def _positive_(h: Tensor, out: Tensor | None, features: Features, dims: tuple[int, ...]) -> Tensor:
    if features.kernel == "identity":
        return h
    if features.kernel == "relu":
        return torch.clamp(h, min=0, out=out).add_(features.eps)
    if features.kernel == "elu":
        above = h.relu().add_(features.eps)
        return exp_(torch.clamp(h, max=0, out=out)).add_(above)
    phi = exp_(torch.sub(h, h.amax(dim=dims, keepdim=True), out=out))
    return phi if features.kernel == "softmax" else phi.add_(features.eps)


def _through_queries(
    q: Tensor, context: Tensor, d_y: tuple[Tensor, Tensor, Tensor], features: Features
) -> tuple[Tensor, Tensor]:
    """Gradients of a block's queries and of S, from the gradient of y, y and D."""
    gradient, y, normaliser = d_y
    phi = _of_queries(q, features)
    # y = n / D: ∂n = ∂y / D and ∂D = -(∂n · y), side by side as n and D are.
    d_both = phi.new_empty(*y.shape[:-1], y.shape[-1] + 1)
    d_n = torch.div(gradient, normaliser, out=d_both[..., :-1])
    d_both[..., -1] = -(d_n * y).sum(dim=-1)
    d_context = torch.bmm(phi.mT, d_both)
    d_h = _through_positive(torch.bmm(d_both, context.mT), phi, features, out=phi)
    return d_h if features.omega is None else d_h @ features.matrix(d_h.dtype), d_context


def _through_keys(k: Tensor, v: Tensor, phi: Tensor, d_context: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """Gradients of a block's keys and values."""
    d_context, d_sum = d_context.split([v.shape[-1], 1], dim=-1)
    d_h = _through_positive(torch.baddbmm(d_sum.mT, v, d_context.mT), phi, features)
    d_k = d_h if features.omega is None else d_h @ features.matrix(d_h.dtype)
    if features.kernel == "exp":  # the gradient of -‖s k‖² / 2
        d_k.addcmul_(k * features.scale**2, d_h.sum(dim=-1, keepdim=True), value=-1)
    return d_k, torch.bmm(phi, d_context)


def _through_quotient(d_context: Tensor, context: Tensor, phi: Tensor) -> Tensor:
    """Gradient of [φ(k)ᵀ v, Σ φ(k)] from that of their quotient C, the first columns of S."""
    sums = phi.sum(dim=-2).unsqueeze(-1)
    d_products = d_context[..., :-1] / sums
    d_sums = -(d_products * context[..., :-1]).sum(dim=-1, keepdim=True)
    return torch.cat([d_products, d_sums], dim=-1)


def _through_positive(d_phi: Tensor, phi: Tensor, features: Features, out: Tensor | None = None) -> Tensor:
    """∂h from ∂φ and φ, in place of ∂φ: exp' = exp, relu' = 1 above zero, elu' = exp but at most 1."""
    if features.kernel == "identity":
        return d_phi
    if features.kernel == "relu":
        return d_phi.mul_(phi > features.eps)
    if features.kernel == "softmax":
        return d_phi.mul_(phi)
    derivative = torch.sub(phi, features.eps, out=out)
    return d_phi.mul_(derivative.clamp_(max=1) if features.kernel == "elu" else derivative)


def _context(phi_k: Tensor, v: Tensor, features: Features) -> Tensor:
    products, sums = torch.bmm(phi_k.mT, v), phi_k.sum(dim=-2).unsqueeze(-1)
    if features.kernel == "softmax":
        products, sums = products.div_(sums), torch.ones_like(sums)
    return torch.cat([products, sums], dim=-1)


def in_triton(q: Tensor, k: Tensor, v: Tensor, features: Features, dropout_p: float = 0.0) -> Tensor:
    """By `effvit.kernels.cuda`: up to 128 features and 64 columns; one scale for all of these, but for ``focused``.

    Without dropout.
    """
    assert not dropout_p, "no form with dropout"
    if features.kernel == "focused":
        return InTriton.apply(q, k, v, features.scale, features.kernel, features.eps, features.power)
    return InTriton.apply(q, k, v, features.omega, features.kernel, features.eps, features.scale)


class InTriton(torch.autograd.Function):
    """Training keeps q, k, v and S of each head; features are computed again. ``focused`` has its s as ``omega``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, *rest: Any) -> Tensor:
        from effvit.kernels.cuda.feature_attention import attend

        ctx.rest = rest
        y, state = attend(q, k, v, omega, *rest)
        ctx.save_for_backward(q, k, v, omega, state)
        return y

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from effvit.kernels.cuda.feature_gradients import attend_backward

        q, k, v, omega, state = ctx.saved_tensors
        kernel, eps, scale = ctx.rest
        focused = kernel == "focused"
        if not torch.is_grad_enabled():
            d_q, d_k, d_v, d_scale = attend_backward(*gradients, q, k, v, omega, state, *ctx.rest)
            return d_q, d_k, d_v, d_scale if focused else None, None, None, None

        def equation(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
            features = Features(kernel, eps, omega, scale) if s is None else Features(kernel, eps, None, s, scale)
            return reference(q, k, v, features)

        found = choice.through_equation(equation, (q, k, v, omega) if focused else (q, k, v), *gradients)
        return *found, *[None] * (3 if focused else 4)


FORMS = {"by blocks": by_blocks}
