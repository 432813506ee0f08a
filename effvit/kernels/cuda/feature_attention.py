"""φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) in two passes: over blocks of keys, then over blocks of queries.

A head's ``state`` is what queries need of its keys: S = φ(k)ᵀ v ``(m, e)``, Z = Σ φ(k) ``(m,)`` and c ``(m,)``, which
is taken from exponents. Training keeps q, k, v and the state; the backward pass computes features again.

With ``softmax`` φ(q) are exponentials alone, S is [φ(k)ᵀ v] / Σ φ(k) and Z is 1; then c has log Σ φ(k) added, so that
φ(k) comes out normalised the second time.

A program holds one strip of features at a time, and sums over some tokens in their order. Partial results of longer
sequences are summed in their order too. How many there are depends on the sequence alone, as a sample's rounding must
not depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda import features
from effvit.kernels.cuda.blocks import by_rows, like_heads, on_its_device, product, rows_of, side, store_rows
from effvit.kernels.cuda.features import (
    exponents_of,
    largest_of,
    norms_of,
    number_of,
    options_of,
    place,
    positive,
    splits_of,
    x_hat_of,
)

MOST_FEATURES = 128
WIDEST = 64
"""Columns of a head's queries or values."""


@triton.jit
def _finished(s, z, c, sum_v, number, eps, KERNEL: tl.constexpr):
    """S, Z and c of all keys, from sums without ε."""
    if KERNEL == "softmax":
        s /= z[:, None]
        c += tl.log(z)
        z = tl.full(z.shape, 1.0, tl.float32)
    else:
        s += eps * sum_v[None, :]
        z += eps * number
    return s, z, c


@triton.jit
def sum_keys(
    k, v, omega, states, k_b, k_h, k_n, v_b, v_h, v_n, heads, number, d, m, e, splits, length, strips, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """S, Z and c, and Σ v ``(e,)``, of a split of a head's keys; without ε unless this is the whole head."""
    strip = tl.program_id(0) % strips * STRIP
    part = tl.program_id(0) // strips
    _, b, h, first, last = place(part, splits, length, number, heads)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    if KERNEL == "focused":
        omega += h * d
    features, columns = strip + tl.arange(0, STRIP), tl.arange(0, E)
    s = tl.zeros((STRIP, E), tl.float32)
    z = tl.zeros((STRIP,), tl.float32)
    sum_v = tl.zeros((E,), tl.float32)
    c = tl.full((STRIP,), float("-inf"), tl.float32)
    for start in range(first, last, ROWS):
        exponents = exponents_of(k, start, k_n, last, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
        is_key = (start + tl.arange(0, ROWS) < last)[:, None]
        is_any = is_key & (features < m)[None, :]
        if KERNEL == "exp":  # one c for all features
            key = rows_of(k, start, k_n, last, d, ROWS, D)
            exponents -= 0.5 * scale * scale * tl.sum(key * key, axis=1)[:, None]
            largest = tl.maximum(c, tl.max(tl.max(tl.where(is_any, exponents, float("-inf")), axis=1), axis=0))
        if KERNEL == "softmax":
            largest = tl.maximum(c, tl.max(tl.where(is_key, exponents, float("-inf")), axis=0))
        if KERNEL == "focused":
            norms = norms_of(x_hat_of(k, start, k_n, last, omega, d, ROWS, D), exponents, d, D)
            exponents -= norms[:, None]
        if KERNEL == "exp" or KERNEL == "softmax":
            s *= tl.exp(c - largest)[:, None]
            z *= tl.exp(c - largest)
            c = largest
            exponents -= c[None, :]
        phi = positive(exponents, is_any, KERNEL)
        value = rows_of(v, start, v_n, last, e, ROWS, E)
        s += product(tl.trans(phi), value, EXACT)
        z += tl.sum(phi, axis=0)
        sum_v += tl.sum(value, axis=0)
    if WHOLE:
        s, z, c = _finished(s, z, c, sum_v, number, eps, KERNEL)
    states += part.to(tl.int64) * (m * e + 2 * m + e)
    store_rows(states, strip, e, m, e, s, STRIP, E)
    tl.store(states + m * e + features, z, mask=features < m)
    tl.store(states + m * e + m + features, c, mask=features < m)
    tl.store(states + m * e + 2 * m + columns, sum_v, mask=(columns < e) & (strip == 0))


@triton.jit
def join_keys(
    states, state, number, m, e, splits, strips, eps,
    KERNEL: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """State of a head from those of its splits, one after the other."""
    strip, head = tl.program_id(0) % strips * STRIP, (tl.program_id(0) // strips).to(tl.int64)
    features, columns, every = strip + tl.arange(0, STRIP), tl.arange(0, E), tl.arange(0, ALL)
    each = m * e + 2 * m + e
    states += head * splits * each
    c = tl.zeros((STRIP,), tl.float32)
    if KERNEL == "exp" or KERNEL == "softmax":
        c += float("-inf")
        for split in range(splits):
            at = states + split * each + m * e + m
            if KERNEL == "exp":
                c = tl.maximum(c, tl.max(tl.load(at + every, mask=every < m, other=float("-inf")), axis=0))
            else:
                c = tl.maximum(c, tl.load(at + features, mask=features < m, other=0.0))
    s = tl.zeros((STRIP, E), tl.float32)
    z = tl.zeros((STRIP,), tl.float32)
    sum_v = tl.zeros((E,), tl.float32)
    for split in range(splits):
        at = states + split * each
        weight = tl.full((STRIP,), 1.0, tl.float32)
        if KERNEL == "exp" or KERNEL == "softmax":
            weight = tl.exp(tl.load(at + m * e + m + features, mask=features < m, other=0.0) - c)
        s += weight[:, None] * rows_of(at, strip, e, m, e, STRIP, E)
        z += weight * tl.load(at + m * e + features, mask=features < m, other=1.0)
        sum_v += tl.load(at + m * e + 2 * m + columns, mask=columns < e, other=0.0)
    s, z, c = _finished(s, z, c, sum_v, number, eps, KERNEL)
    state += head * each
    store_rows(state, strip, e, m, e, s, STRIP, E)
    tl.store(state + m * e + features, z, mask=features < m)
    tl.store(state + m * e + m + features, c, mask=features < m)


@triton.jit
def mix_queries(
    q, omega, state, y, q_b, q_h, q_n, y_b, y_h, y_n, heads, number, d, m, e, splits, length, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Outputs of some of a head's queries."""
    head, b, h, first, last = place(tl.program_id(0), splits, length, number, heads)
    q += b * q_b + h * q_h
    y += b * y_b + h * y_h
    if KERNEL == "focused":
        omega += h * d
    state += head.to(tl.int64) * (m * e + 2 * m + e)
    for start in range(first, last, ROWS):
        c = largest_of(q, start, q_n, last, omega, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
        out = tl.zeros((ROWS, E), tl.float32)
        normaliser = tl.zeros((ROWS,), tl.float32)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            exponents = exponents_of(
                q, start, q_n, last, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP
            )
            phi = positive(exponents - c[:, None], (features < m)[None, :], KERNEL) + eps
            z = tl.load(state + m * e + features, mask=features < m, other=0.0)
            normaliser += tl.sum(phi * z[None, :], axis=1)
            out += product(phi, rows_of(state, strip, e, m, e, STRIP, E), EXACT)
        is_query = start + tl.arange(0, ROWS) < last
        store_rows(y, start, y_n, last, e, out / tl.where(is_query, normaliser, 1.0)[:, None], ROWS, E)


@torch.library.custom_op("effvit::feature_attention", mutates_args=())
@on_its_device
def attend(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, kernel: str, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, H, M, e)``, and states of heads; shapes and ``kernel`` as in `kernels.feature_attention`.

    With ``focused`` ``omega`` is the scale of columns ``(H, 1, d)``, and ``scale`` the power.
    """
    q, k, v, options = by_rows(q), by_rows(k), by_rows(v), options_of(kernel, omega, q, k, v)
    samples, heads, number, d = k.shape
    e, m, strip = v.shape[-1], number_of(kernel, omega, k), options["STRIP"]
    rotation = q if omega is None else omega.float().contiguous()
    strips, (splits, length) = triton.cdiv(m, strip), splits_of(number, features.SUMMED)
    states = q.new_empty(samples * heads * splits, m * e + 2 * m + e, dtype=torch.float32)
    whole = splits == 1 and strips == 1
    sum_keys[(samples * heads * splits * strips,)](
        *(k, v, rotation, states, *k.stride()[:3], *v.stride()[:3]),
        *(heads, number, d, m, e, splits, length, strips, eps, scale),
        WHOLE=whole,
        **options,
    )
    state = states
    if not whole:
        state = states.new_empty(samples * heads, states.shape[1])
        options_here = {"KERNEL": kernel, "E": options["E"], "STRIP": strip, "ALL": side(m), "num_warps": 8}
        join_keys[(samples * heads * strips,)](states, state, number, m, e, splits, strips, eps, **options_here)
    y = like_heads(q, e, v.dtype)
    splits, length = splits_of(q.shape[2], features.APART)
    mix_queries[(samples * heads * splits,)](
        *(q, rotation, state, y, *q.stride()[:3], *y.stride()[:3]),
        *(heads, q.shape[2], d, m, e, splits, length, eps, scale),
        **options,
    )
    return y, state


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, kernel: str, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    e, m = v.shape[-1], number_of(kernel, omega, k)
    return like_heads(q, e, v.dtype), q.new_empty(k.shape[0] * k.shape[1], m * e + 2 * m + e, dtype=torch.float32)
