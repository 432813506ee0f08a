"""Gradients of `feature_attention`: over blocks of queries, their sums for the state, then over blocks of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda import features
from effvit.kernels.cuda.blocks import by_rows, like_heads, on_its_device, product, rows_of, store_rows
from effvit.kernels.cuda.features import (
    TINY,
    exponents_of,
    largest_of,
    norms_of,
    number_of,
    options_of,
    place,
    positive,
    splits_of,
    squares_of,
    through_positive,
    x_hat_of,
)


@triton.jit
def through_queries(
    gradient, q, omega, state, d_q, d_omega, rests, g_b, g_h, g_n, q_b, q_h, q_n, o_b, o_h, o_n,
    heads, number, d, m, e, splits, length, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """∂q of some of a head's queries; ``rests`` ``(heads, 3, number)``: c, D and ∂D of each.

    y = n / D with n = φ S and D = φ · Z. So ∂n = ∂y / D and ∂D = -(∂n · y), where ∂n · y = φ · S ∂y / D².

    With ``focused``, as a factor of φ cancels in y, h = p log x̂ is all that y depends on. Then ``d_omega`` gets what
    the gradient of a column's scale is a sum of: -scale ∂scale = Σ x̂ ∂x̂ = p Σ ∂h.
    """
    head, b, h, first, last = place(tl.program_id(0), splits, length, number, heads)
    gradient += b * g_b + h * g_h
    q += b * q_b + h * q_h
    if KERNEL == "focused":
        omega += h * d
    sums = tl.zeros((D,), tl.float32)
    d_q += b * o_b + h * o_h
    state += head.to(tl.int64) * (m * e + 2 * m + e)
    rests += head.to(tl.int64) * 3 * number
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        c = largest_of(q, start, q_n, last, omega, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
        d_y = rows_of(gradient, start, g_n, last, e, ROWS, E)
        normaliser = tl.zeros((ROWS,), tl.float32)
        d_d = tl.zeros((ROWS,), tl.float32)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            exponents = exponents_of(
                q, start, q_n, last, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP
            )
            phi = positive(exponents - c[:, None], (features < m)[None, :], KERNEL) + eps
            z = tl.load(state + m * e + features, mask=features < m, other=0.0)
            normaliser += tl.sum(phi * z[None, :], axis=1)
            s_d_y = product(d_y, tl.trans(rows_of(state, strip, e, m, e, STRIP, E)), EXACT)
            d_d -= tl.sum(phi * s_d_y, axis=1)
        normaliser = tl.where(rows < last, normaliser, 1.0)
        d_d /= normaliser * normaliser
        out = tl.zeros((ROWS, D), tl.float32)
        for strip in range(0, m, STRIP):
            features = strip + tl.arange(0, STRIP)
            exponents = exponents_of(
                q, start, q_n, last, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP
            )
            phi = positive(exponents - c[:, None], (features < m)[None, :], KERNEL)
            z = tl.load(state + m * e + features, mask=features < m, other=0.0)
            s_d_y = product(d_y, tl.trans(rows_of(state, strip, e, m, e, STRIP, E)), EXACT)
            d_phi = s_d_y / normaliser[:, None] + d_d[:, None] * z[None, :]
            d_h = through_positive(d_phi, phi, KERNEL)
            if OMEGA:
                out += product(d_h, scale * rows_of(omega, strip, d, m, d, STRIP, D), EXACT)
            elif KERNEL == "focused":
                sums += tl.sum(scale * d_h, axis=0)
                x = rows_of(q, start, q_n, last, d, ROWS, D)
                store_rows(d_q, start, o_n, last, d, tl.where(x > 0, scale * d_h / (x + TINY), 0.0), ROWS, D)
            else:
                store_rows(d_q + strip, start, o_n, last, m - strip, d_h, ROWS, STRIP)
        if OMEGA:
            store_rows(d_q, start, o_n, last, d, out, ROWS, D)
        tl.store(rests + rows, c, mask=rows < last)
        tl.store(rests + number + rows, normaliser, mask=rows < last)
        tl.store(rests + 2 * number + rows, d_d, mask=rows < last)
    if KERNEL == "focused":
        columns = tl.arange(0, D)
        tl.store(d_omega + tl.program_id(0) * d + columns, sums, mask=columns < d)


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
    head, b, h, first, last = place(part, splits, length, number, heads)
    gradient += b * g_b + h * g_h
    q += b * q_b + h * q_h
    rests += head.to(tl.int64) * 3 * number
    if KERNEL == "focused":
        omega += h * d
    features = strip + tl.arange(0, STRIP)
    d_s = tl.zeros((STRIP, E), tl.float32)
    d_z = tl.zeros((STRIP,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        c = tl.load(rests + rows, mask=rows < last, other=0.0)
        normaliser = tl.load(rests + number + rows, mask=rows < last, other=1.0)
        d_d = tl.load(rests + 2 * number + rows, mask=rows < last, other=0.0)
        exponents = exponents_of(q, start, q_n, last, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP)
        phi = positive(exponents - c[:, None], (features < m)[None, :], KERNEL) + eps
        d_n = rows_of(gradient, start, g_n, last, e, ROWS, E) / normaliser[:, None]
        d_s += product(tl.trans(phi), d_n, EXACT)
        d_z += tl.sum(phi * d_d[:, None], axis=0)
    d_states += part.to(tl.int64) * (m * e + m)
    store_rows(d_states, strip, e, m, e, d_s, STRIP, E)
    tl.store(d_states + m * e + features, d_z, mask=features < m)


@triton.jit
def through_keys(
    k, v, omega, state, d_state, d_k, d_v, d_omega, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, number, d, m, e, splits, length, eps, scale,
    KERNEL: tl.constexpr, OMEGA: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of some of a head's keys. With ``softmax`` ∂Z is what keeps the sum over keys: -(S · ∂S).

    With ``focused`` φ = ‖x̂‖ x̂ᵖ / ‖x̂ᵖ‖. So x̂ ∂x̂ = x̂² t + p φ (∂φ - φ t) with t = ∂φ · φ / ‖x̂‖², see
    `through_queries` for what ``d_omega`` gets.
    """
    head, b, h, first, last = place(tl.program_id(0), splits, length, number, heads)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    d_k += b * dk_b + h * dk_h
    d_v += b * dv_b + h * dv_h
    if KERNEL == "focused":
        omega += h * d
    sums = tl.zeros((D,), tl.float32)
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
            exponents = exponents_of(
                k, start, k_n, last, omega, strip, d, m, scale, KERNEL, OMEGA, EXACT, ROWS, D, STRIP
            )
            if KERNEL == "exp" or KERNEL == "softmax":
                c = tl.load(state + m * e + m + features, mask=features < m, other=0.0)
                exponents -= half_norm[:, None] + c[None, :]
            if KERNEL == "focused":
                x_hat = x_hat_of(k, start, k_n, last, omega, d, ROWS, D)
                exponents -= norms_of(x_hat, exponents, d, D)[:, None]
            # Rows outside are stored nowhere, and may have any exponent.
            is_any = (start + tl.arange(0, ROWS) < last)[:, None] & (features < m)[None, :]
            phi = positive(exponents, is_any, KERNEL)
            d_phi = product(value, tl.trans(d_s), EXACT) + d_z[None, :]
            d_h = through_positive(d_phi, phi, KERNEL)
            if KERNEL == "focused":
                t = (tl.sum(d_h, axis=1) / squares_of(x_hat, d, D))[:, None]
                turned = x_hat * x_hat * t + scale * phi * (d_phi - phi * t)
                sums += tl.sum(turned, axis=0)
                x = rows_of(k, start, k_n, last, d, ROWS, D)
                store_rows(d_k, start, dk_n, last, d, tl.where(x > 0, turned / (x + TINY), 0.0), ROWS, D)
            elif OMEGA:
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
    if KERNEL == "focused":
        columns = tl.arange(0, D)
        tl.store(d_omega + tl.program_id(0) * d + columns, sums, mask=columns < d)


@torch.library.custom_op("effvit::feature_attention_backward", mutates_args=())
@on_its_device
def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, state: Tensor,
    kernel: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from that of the outputs; with ``focused`` of ``omega``, else empty."""
    gradient, q, k, v, options = (
        by_rows(gradient),
        by_rows(q),
        by_rows(k),
        by_rows(v),
        options_of(kernel, omega, q, k, v),
    )
    samples, heads, number, d = k.shape
    queries, e, m = q.shape[2], v.shape[-1], number_of(kernel, omega, k)
    rotation = q if omega is None else omega.float().contiguous()
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    rests = state.new_empty(samples * heads, 3, queries)
    splits, length = splits_of(queries, features.APART)
    of_queries = state.new_empty(samples, heads, splits, d if kernel == "focused" else 0)
    through_queries[(samples * heads * splits,)](
        *(gradient, q, rotation, state, d_q, of_queries, rests),
        *(*gradient.stride()[:3], *q.stride()[:3], *d_q.stride()[:3]),
        *(heads, queries, d, m, e, splits, length, eps, scale),
        **options,
    )
    strips, (splits, length) = triton.cdiv(m, options["STRIP"]), splits_of(queries, features.SUMMED)
    d_states = state.new_empty(samples * heads, splits, m * e + m)
    sum_queries[(samples * heads * splits * strips,)](
        *(gradient, q, rotation, rests, d_states, *gradient.stride()[:3], *q.stride()[:3]),
        *(heads, queries, d, m, e, splits, length, strips, eps, scale),
        **options,
    )
    d_state = d_states if splits == 1 else d_states.sum(dim=1)
    splits, length = splits_of(number, features.APART)
    of_keys = state.new_empty(samples, heads, splits, of_queries.shape[-1])
    through_keys[(samples * heads * splits,)](
        *(k, v, rotation, state, d_state, d_k, d_v, of_keys),
        *(*k.stride()[:3], *v.stride()[:3], *d_k.stride()[:3], *d_v.stride()[:3]),
        *(heads, number, d, m, e, splits, length, eps, scale),
        **options,
    )
    if omega is None or kernel != "focused":
        return d_q, d_k, d_v, state.new_empty(0)
    sums = torch.cat([of_queries, of_keys], dim=2).sum(dim=(0, 2)).unsqueeze(1)
    return d_q, d_k, d_v, (-sums / rotation).to(omega.dtype)


@attend_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, state: Tensor,
    kernel: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    d_omega = state.new_empty(0) if omega is None or kernel != "focused" else torch.empty_like(omega)
    return d_q, d_k, d_v, d_omega
