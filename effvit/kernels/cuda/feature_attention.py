"""φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) in two passes: over blocks of keys, then over blocks of queries.

A head's ``state`` is what queries need of its keys: S = φ(k)ᵀ v ``(m, e)``, Z = Σ φ(k) ``(m,)`` and c ``(m,)``, which
is taken from exponents. Training keeps q, k, v and the state; the backward pass computes features again.

With ``softmax`` φ(q) are exponentials alone, S is [φ(k)ᵀ v] / Σ φ(k) and Z is 1; then c has log Σ φ(k) added, so that
φ(k) comes out normalised the second time.

A program holds one strip of features at a time, and sums over some tokens in their order. Partial results of longer
sequences are summed in their order too. How many there are depends on the sequence alone, as a sample's rounding must
not depend on its batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import by_rows, is_exact, like_heads, on_its_device, product, rows_of, side, store_rows

MOST_FEATURES = 128
WIDEST = 64
"""Columns of a head's queries or values."""

_SUMMED = 1024  # tokens that a program sums over
_APART = 256  # tokens per program where nothing is summed
_ROWS = 32  # tokens per block
_STRIP = 32  # features


@triton.jit
def _exponents(
    x, first, stride, number, omega, strip, d, m, scale,
    OMEGA: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """h = s x Ωᵀ or x of a block of rows and a strip of features."""
    if OMEGA:
        rotation = scale * rows_of(omega, strip, d, m, d, STRIP, D)
        h = product(rows_of(x, first, stride, number, d, ROWS, D), tl.trans(rotation), EXACT)
    else:
        h = rows_of(x + strip, first, stride, number, m - strip, ROWS, STRIP)
    return h


@triton.jit
def _largest(
    x, first, stride, number, omega, d, m, scale, KERNEL: tl.constexpr,
    OMEGA: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The largest exponent of each query, or 0 where no exponential is taken."""
    largest = tl.zeros((ROWS,), tl.float32)
    if KERNEL == "exp" or KERNEL == "softmax":
        largest += float("-inf")
        for strip in range(0, m, STRIP):
            h = _exponents(x, first, stride, number, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
            is_feature = (strip + tl.arange(0, STRIP) < m)[None, :]
            largest = tl.maximum(largest, tl.max(tl.where(is_feature, h, float("-inf")), axis=1))
    return largest


@triton.jit
def _positive(h, is_any, KERNEL: tl.constexpr):
    """φ without ε, of exponents that c has been taken from; 0 where there is none."""
    phi = h
    if KERNEL == "exp" or KERNEL == "softmax":
        phi = tl.exp(h)
    if KERNEL == "relu":
        phi = tl.maximum(h, 0.0)
    if KERNEL == "elu":
        phi = tl.exp(tl.minimum(h, 0.0)) + tl.maximum(h, 0.0)
    return tl.where(is_any, phi, 0.0)


@triton.jit
def _through_positive(d_phi, phi, KERNEL: tl.constexpr):
    """∂h from ∂φ and φ without ε: exp' = exp, relu' = 1 above zero, elu' = exp but at most 1."""
    d_h = d_phi
    if KERNEL == "exp" or KERNEL == "softmax":
        d_h = d_phi * phi
    if KERNEL == "relu":
        d_h = tl.where(phi > 0, d_phi, 0.0)
    if KERNEL == "elu":
        d_h = d_phi * tl.minimum(phi, 1.0)
    return d_h


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
def _place(program, splits, length, number, heads):
    """Head, its sample and its number there, and the first token of this split and that of the next."""
    head = program // splits
    first = program % splits * length
    return head, (head // heads).to(tl.int64), (head % heads).to(tl.int64), first, tl.minimum(first + length, number)


@triton.jit
def sum_keys(
    k, v, omega, states, k_b, k_h, k_n, v_b, v_h, v_n, heads, number, d, m, e, splits, length, strips, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """S, Z and c, and Σ v ``(e,)``, of a split of a head's keys; without ε unless this is the whole head."""
    strip = tl.program_id(0) % strips * STRIP
    part = tl.program_id(0) // strips
    _, b, h, first, last = _place(part, splits, length, number, heads)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    features, columns = strip + tl.arange(0, STRIP), tl.arange(0, E)
    s = tl.zeros((STRIP, E), tl.float32)
    z = tl.zeros((STRIP,), tl.float32)
    sum_v = tl.zeros((E,), tl.float32)
    c = tl.full((STRIP,), float("-inf"), tl.float32)
    for start in range(first, last, ROWS):
        exponents = _exponents(k, start, k_n, last, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
        is_key = (start + tl.arange(0, ROWS) < last)[:, None]
        is_any = is_key & (features < m)[None, :]
        if KERNEL == "exp":  # one c for all features
            key = rows_of(k, start, k_n, last, d, ROWS, D)
            exponents -= 0.5 * scale * scale * tl.sum(key * key, axis=1)[:, None]
            largest = tl.maximum(c, tl.max(tl.max(tl.where(is_any, exponents, float("-inf")), axis=1), axis=0))
        if KERNEL == "softmax":
            largest = tl.maximum(c, tl.max(tl.where(is_key, exponents, float("-inf")), axis=0))
        if KERNEL == "exp" or KERNEL == "softmax":
            s *= tl.exp(c - largest)[:, None]
            z *= tl.exp(c - largest)
            c = largest
            exponents -= c[None, :]
        phi = _positive(exponents, is_any, KERNEL)
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
    head, b, h, first, last = _place(tl.program_id(0), splits, length, number, heads)
    q += b * q_b + h * q_h
    y += b * y_b + h * y_h
    state += head.to(tl.int64) * (m * e + 2 * m + e)
    for start in range(first, last, ROWS):
        c = _largest(q, start, q_n, last, omega, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
        out = tl.zeros((ROWS, E), tl.float32)
        normaliser = tl.zeros((ROWS,), tl.float32)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            exponents = _exponents(q, start, q_n, last, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
            phi = _positive(exponents - c[:, None], (features < m)[None, :], KERNEL) + eps
            z = tl.load(state + m * e + features, mask=features < m, other=0.0)
            normaliser += tl.sum(phi * z[None, :], axis=1)
            out += product(phi, rows_of(state, strip, e, m, e, STRIP, E), EXACT)
        is_query = start + tl.arange(0, ROWS) < last
        store_rows(y, start, y_n, last, e, out / tl.where(is_query, normaliser, 1.0)[:, None], ROWS, E)


@triton.jit
def through_queries(
    gradient, q, omega, state, d_q, rests, g_b, g_h, g_n, q_b, q_h, q_n, o_b, o_h, o_n,
    heads, number, d, m, e, splits, length, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """∂q of some of a head's queries; ``rests`` ``(heads, 3, number)``: c, D and ∂D of each.

    y = n / D with n = φ S and D = φ · Z. So ∂n = ∂y / D and ∂D = -(∂n · y), where ∂n · y = φ · S ∂y / D².
    """
    head, b, h, first, last = _place(tl.program_id(0), splits, length, number, heads)
    gradient += b * g_b + h * g_h
    q += b * q_b + h * q_h
    d_q += b * o_b + h * o_h
    state += head.to(tl.int64) * (m * e + 2 * m + e)
    rests += head.to(tl.int64) * 3 * number
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        c = _largest(q, start, q_n, last, omega, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
        d_y = rows_of(gradient, start, g_n, last, e, ROWS, E)
        normaliser = tl.zeros((ROWS,), tl.float32)
        d_d = tl.zeros((ROWS,), tl.float32)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            exponents = _exponents(q, start, q_n, last, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
            phi = _positive(exponents - c[:, None], (features < m)[None, :], KERNEL) + eps
            z = tl.load(state + m * e + features, mask=features < m, other=0.0)
            normaliser += tl.sum(phi * z[None, :], axis=1)
            s_d_y = product(d_y, tl.trans(rows_of(state, strip, e, m, e, STRIP, E)), EXACT)
            d_d -= tl.sum(phi * s_d_y, axis=1)
        normaliser = tl.where(rows < last, normaliser, 1.0)
        d_d /= normaliser * normaliser
        out = tl.zeros((ROWS, D), tl.float32)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            exponents = _exponents(q, start, q_n, last, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
            phi = _positive(exponents - c[:, None], (features < m)[None, :], KERNEL)
            z = tl.load(state + m * e + features, mask=features < m, other=0.0)
            s_d_y = product(d_y, tl.trans(rows_of(state, strip, e, m, e, STRIP, E)), EXACT)
            d_phi = s_d_y / normaliser[:, None] + d_d[:, None] * z[None, :]
            d_h = _through_positive(d_phi, phi, KERNEL)
            if OMEGA:
                out += product(d_h, scale * rows_of(omega, strip, d, m, d, STRIP, D), EXACT)
            else:
                store_rows(d_q + strip, start, o_n, last, m - strip, d_h, ROWS, STRIP)
        if OMEGA:
            store_rows(d_q, start, o_n, last, d, out, ROWS, D)
        tl.store(rests + rows, c, mask=rows < last)
        tl.store(rests + number + rows, normaliser, mask=rows < last)
        tl.store(rests + 2 * number + rows, d_d, mask=rows < last)


@triton.jit
def sum_queries(
    gradient, q, omega, rests, d_states, g_b, g_h, g_n, q_b, q_h, q_n,
    heads, number, d, m, e, splits, length, strips, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """∂S and ∂Z, as far as they come from a split of a head's queries."""
    strip = tl.program_id(0) % strips * STRIP
    part = tl.program_id(0) // strips
    head, b, h, first, last = _place(part, splits, length, number, heads)
    gradient += b * g_b + h * g_h
    q += b * q_b + h * q_h
    rests += head.to(tl.int64) * 3 * number
    features = strip + tl.arange(0, STRIP)
    d_s = tl.zeros((STRIP, E), tl.float32)
    d_z = tl.zeros((STRIP,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        c = tl.load(rests + rows, mask=rows < last, other=0.0)
        normaliser = tl.load(rests + number + rows, mask=rows < last, other=1.0)
        d_d = tl.load(rests + 2 * number + rows, mask=rows < last, other=0.0)
        exponents = _exponents(q, start, q_n, last, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
        phi = _positive(exponents - c[:, None], (features < m)[None, :], KERNEL) + eps
        d_n = rows_of(gradient, start, g_n, last, e, ROWS, E) / normaliser[:, None]
        d_s += product(tl.trans(phi), d_n, EXACT)
        d_z += tl.sum(phi * d_d[:, None], axis=0)
    d_states += part.to(tl.int64) * (m * e + m)
    store_rows(d_states, strip, e, m, e, d_s, STRIP, E)
    tl.store(d_states + m * e + features, d_z, mask=features < m)


@triton.jit
def through_keys(
    k, v, omega, state, d_state, d_k, d_v, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, number, d, m, e, splits, length, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of some of a head's keys. With ``softmax`` ∂Z is what keeps the sum over keys: -(S · ∂S)."""
    head, b, h, first, last = _place(tl.program_id(0), splits, length, number, heads)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    d_k += b * dk_b + h * dk_h
    d_v += b * dv_b + h * dv_h
    state += head.to(tl.int64) * (m * e + 2 * m + e)
    d_state += head.to(tl.int64) * (m * e + m)
    for start in range(first, last, ROWS):
        value = rows_of(v, start, v_n, last, e, ROWS, E)
        of_d_k = tl.zeros((ROWS, D), tl.float32)
        of_d_v = tl.zeros((ROWS, E), tl.float32)
        sum_d_h = tl.zeros((ROWS,), tl.float32)
        half_norm = tl.zeros((ROWS,), tl.float32)
        if KERNEL == "exp":
            key = rows_of(k, start, k_n, last, d, ROWS, D)
            half_norm += 0.5 * scale * scale * tl.sum(key * key, axis=1)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            d_s = rows_of(d_state, strip, e, m, e, STRIP, E)
            if KERNEL == "softmax":
                d_z = -tl.sum(rows_of(state, strip, e, m, e, STRIP, E) * d_s, axis=1)
            else:
                d_z = tl.load(d_state + m * e + features, mask=features < m, other=0.0)
            exponents = _exponents(k, start, k_n, last, omega, strip, d, m, scale, OMEGA, EXACT, ROWS, D, STRIP)
            if KERNEL == "exp" or KERNEL == "softmax":
                c = tl.load(state + m * e + m + features, mask=features < m, other=0.0)
                exponents -= half_norm[:, None] + c[None, :]
            # Rows outside are stored nowhere, and may have any exponent.
            is_any = (start + tl.arange(0, ROWS) < last)[:, None] & (features < m)[None, :]
            phi = _positive(exponents, is_any, KERNEL)
            d_h = _through_positive(product(value, tl.trans(d_s), EXACT) + d_z[None, :], phi, KERNEL)
            if OMEGA:
                of_d_k += product(d_h, scale * rows_of(omega, strip, d, m, d, STRIP, D), EXACT)
                sum_d_h += tl.sum(d_h, axis=1)
            else:
                store_rows(d_k + strip, start, dk_n, last, m - strip, d_h, ROWS, STRIP)
            of_d_v += product(phi + eps, d_s, EXACT)
        if OMEGA:
            if KERNEL == "exp":  # the gradient of -‖s k‖² / 2
                key = rows_of(k, start, k_n, last, d, ROWS, D)
                of_d_k -= scale * scale * key * sum_d_h[:, None]
            store_rows(d_k, start, dk_n, last, d, of_d_k, ROWS, D)
        store_rows(d_v, start, dv_n, last, e, of_d_v, ROWS, E)


def _splits(number: int, longest: int) -> tuple[int, int]:
    """How many parts of whole blocks, no longer than this, a sequence has, and how long they are."""
    blocks = triton.cdiv(number, _ROWS)
    length = triton.cdiv(blocks, triton.cdiv(number, longest)) * _ROWS
    return triton.cdiv(number, length), length


def _options(kernel: str, omega: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What kernels are compiled for."""
    sides, exact = {"D": side(q.shape[-1]), "E": side(v.shape[-1]), "STRIP": _STRIP}, is_exact(q, k, v)
    # A factor in two parts takes twice the registers.
    rows = _ROWS // 2 if exact else _ROWS
    options = {"KERNEL": kernel, "OMEGA": omega is not None, "EXACT": exact, "ROWS": rows}
    # All registers that a thread may have: with fewer, two programs share a multiprocessor, and some numbers spill.
    return sides | options | {"num_stages": 1, "maxnreg": 255}


@torch.library.custom_op("effvit::feature_attention", mutates_args=())
@on_its_device
def attend(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, kernel: str, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, H, M, e)``, and states of heads; shapes and ``kernel`` as in `kernels.feature_attention`."""
    q, k, v, options = by_rows(q), by_rows(k), by_rows(v), _options(kernel, omega, q, k, v)
    samples, heads, number, d = k.shape
    e, m = v.shape[-1], d if omega is None else len(omega)
    rotation = q if omega is None else omega.float().contiguous()
    strips, (splits, length) = triton.cdiv(m, _STRIP), _splits(number, _SUMMED)
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
        options_here = {"KERNEL": kernel, "E": options["E"], "STRIP": _STRIP, "ALL": side(m), "num_warps": 8}
        join_keys[(samples * heads * strips,)](states, state, number, m, e, splits, strips, eps, **options_here)
    y = like_heads(q, e, v.dtype)
    splits, length = _splits(q.shape[2], _APART)
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
    e, m = v.shape[-1], k.shape[-1] if omega is None else len(omega)
    return like_heads(q, e, v.dtype), q.new_empty(k.shape[0] * k.shape[1], m * e + 2 * m + e, dtype=torch.float32)


@torch.library.custom_op("effvit::feature_attention_backward", mutates_args=())
@on_its_device
def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, state: Tensor,
    kernel: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from that of the outputs."""
    gradient, q, k, v, options = by_rows(gradient), by_rows(q), by_rows(k), by_rows(v), _options(kernel, omega, q, k, v)
    samples, heads, number, d = k.shape
    queries, e, m = q.shape[2], v.shape[-1], d if omega is None else len(omega)
    rotation = q if omega is None else omega.float().contiguous()
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    rests = state.new_empty(samples * heads, 3, queries)
    splits, length = _splits(queries, _APART)
    through_queries[(samples * heads * splits,)](
        *(gradient, q, rotation, state, d_q, rests),
        *(*gradient.stride()[:3], *q.stride()[:3], *d_q.stride()[:3]),
        *(heads, queries, d, m, e, splits, length, eps, scale),
        **options,
    )
    strips, (splits, length) = triton.cdiv(m, _STRIP), _splits(queries, _SUMMED)
    d_states = state.new_empty(samples * heads, splits, m * e + m)
    sum_queries[(samples * heads * splits * strips,)](
        *(gradient, q, rotation, rests, d_states, *gradient.stride()[:3], *q.stride()[:3]),
        *(heads, queries, d, m, e, splits, length, strips, eps, scale),
        **options,
    )
    d_state = d_states if splits == 1 else d_states.sum(dim=1)
    splits, length = _splits(number, _APART)
    through_keys[(samples * heads * splits,)](
        *(k, v, rotation, state, d_state, d_k, d_v),
        *(*k.stride()[:3], *v.stride()[:3], *d_k.stride()[:3], *d_v.stride()[:3]),
        *(heads, number, d, m, e, splits, length, eps, scale),
        **options,
    )
    return d_q, d_k, d_v


@attend_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, state: Tensor,
    kernel: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    return d_q, d_k, d_v
