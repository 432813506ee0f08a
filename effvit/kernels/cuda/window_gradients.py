"""Gradients of `window_attention`, window by window; probabilities are computed again.

A program writes the gradients of its window's tokens. Those of prefix tokens, of which every window has a part, are sums
of parts in the order of windows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import by_rows, like_heads, on_its_device, product, rows_of, store_rows
from effvit.kernels.cuda.windows import (
    largest_of,
    no_tensor,
    options_of,
    patches_of,
    place,
    prefix_of,
    rows_at,
    runs_of,
    scores_of,
    store_at,
)


@triton.jit
def _of_asking(gradient, q, state, g_n, q_n, prefix, d, e, scale, S: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    """Queries of prefix tokens, their gradients, ∂y · y and the logarithms of their sums."""
    d_y = rows_of(gradient, 0, g_n, prefix, e, S, E)
    query = scale * rows_of(q, 0, q_n, prefix, d, S, D)
    s = tl.arange(0, S)
    return (
        query,
        d_y,
        tl.sum(d_y * rows_of(state, 0, e + 1, prefix, e, S, E), axis=1),
        tl.load(state + s * (e + 1) + e, mask=s < prefix, other=0.0),
    )


@triton.jit
def through_windows(
    gradient, q, k, v, state, given_q, given_k, given_v, d_q, d_k, d_v, parts,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h,
    iq_b, iq_h, iq_n, ik_b, ik_h, ik_n, iv_b, iv_h, iv_n, oq_b, oq_h, oq_n, ok_b, ok_h, ok_n, ov_b, ov_h, ov_n,
    heads, number, rows, columns, size, dilation, before, down, across, prefix, first, d, e, scale,
    MIXES: tl.constexpr, PREFIX: tl.constexpr, ASKS: tl.constexpr, EXACT: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """∂q, ∂k, ∂v of a window's patches, and its part of those of the prefix tokens.

    Of y = P v: ∂v = Pᵀ ∂y, ∂P = ∂y vᵀ and for the scores P (∂P - ∂y · y). In heads without windows the patches have
    the gradients that are given, to which come those by the prefix tokens' queries.
    """
    b, h, window = place(tl.program_id(0), heads, number)
    gradient += b * g_b + h * g_h
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    d_q += b * oq_b + h * oq_h
    parts += ((b * heads + h) * number + window) * prefix * (2 * d + e)
    tokens, there = patches_of(window, rows, columns, size, dilation, before, down, across, W)
    key = rows_at(k, prefix + tokens, there, k_n, d, D)
    value = rows_at(v, prefix + tokens, there, v_n, e, E)
    if MIXES:
        query = scale * rows_at(q, first + tokens, there, q_n, d, D)
        d_y = rows_at(gradient, first + tokens, there, g_n, e, E)
        scores = scores_of(query, key, there, EXACT)
        largest = largest_of(scores)
        if PREFIX:
            is_prefix = tl.arange(0, S) < prefix
            to_prefix = scores_of(query, rows_of(k, 0, k_n, prefix, d, S, D), is_prefix, EXACT)
            largest = tl.maximum(largest, tl.max(to_prefix, axis=1))
        p = tl.exp(scores - largest[:, None])
        total = tl.sum(p, axis=1)
        if PREFIX:
            p_s = tl.exp(to_prefix - largest[:, None])
            total += tl.sum(p_s, axis=1)
        total = tl.where(there, total, 1.0)
        p /= total[:, None]
        of_v = product(tl.trans(p), d_y, EXACT)
        d_p = product(d_y, tl.trans(value), EXACT)
        common = tl.sum(p * d_p, axis=1)
        if PREFIX:
            p_s /= total[:, None]
            d_p_s = product(d_y, tl.trans(rows_of(v, 0, v_n, prefix, e, S, E)), EXACT)
            common += tl.sum(p_s * d_p_s, axis=1)
        d_scores = p * (d_p - common[:, None])
        of_k = product(tl.trans(d_scores), query, EXACT)
        of_q = product(d_scores, key, EXACT)
        if PREFIX:
            d_scores_s = p_s * (d_p_s - common[:, None])
            of_q += product(d_scores_s, rows_of(k, 0, k_n, prefix, d, S, D), EXACT)
            store_rows(parts + d, 0, 2 * d + e, prefix, d, product(tl.trans(d_scores_s), query, EXACT), S, D)
            store_rows(parts + 2 * d, 0, 2 * d + e, prefix, e, product(tl.trans(p_s), d_y, EXACT), S, E)
        store_at(d_q, first + tokens, there, oq_n, d, scale * of_q, D)
    else:
        of_q = rows_at(given_q + b * iq_b + h * iq_h, tokens, there, iq_n, d, D)
        store_at(d_q, first + tokens, there, oq_n, d, of_q, D)
        of_k = rows_at(given_k + b * ik_b + h * ik_h, prefix + tokens, there, ik_n, d, D)
        of_v = rows_at(given_v + b * iv_b + h * iv_h, prefix + tokens, there, iv_n, e, E)
    if ASKS:
        asking, d_asked, common_s, logarithm = _of_asking(
            gradient, q, state + b * s_b + h * s_h, g_n, q_n, prefix, d, e, scale, S, D, E
        )
        weights = tl.exp(scores_of(asking, key, there, EXACT) - logarithm[:, None])
        of_v += product(tl.trans(weights), d_asked, EXACT)
        d_asking = weights * (product(d_asked, tl.trans(value), EXACT) - common_s[:, None])
        of_k += product(tl.trans(d_asking), asking, EXACT)
        store_rows(parts, 0, 2 * d + e, prefix, d, scale * product(d_asking, key, EXACT), S, D)
    store_at(d_k + b * ok_b + h * ok_h, prefix + tokens, there, ok_n, d, of_k, D)
    store_at(d_v + b * ov_b + h * ov_h, prefix + tokens, there, ov_n, e, of_v, E)


@triton.jit
def through_prefix(
    gradient, q, k, v, state, given_k, given_v, d_q, d_k, d_v, sums,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h,
    ik_b, ik_h, ik_n, iv_b, iv_h, iv_n, oq_b, oq_h, oq_n, ok_b, ok_h, ok_n, ov_b, ov_h, ov_n,
    heads, prefix, d, e, scale, MIXES: tl.constexpr, ASKS: tl.constexpr, EXACT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """∂q, ∂k, ∂v of a head's prefix tokens: sums over windows, what is given, and what they get of one another."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // heads, head % heads
    of_k = tl.zeros((S, D), tl.float32)
    of_v = tl.zeros((S, E), tl.float32)
    sums += head * prefix * (2 * d + e)
    if MIXES:
        of_k += rows_of(sums + d, 0, 2 * d + e, prefix, d, S, D)
        of_v += rows_of(sums + 2 * d, 0, 2 * d + e, prefix, e, S, E)
    else:
        of_k += rows_of(given_k + b * ik_b + h * ik_h, 0, ik_n, prefix, d, S, D)
        of_v += rows_of(given_v + b * iv_b + h * iv_h, 0, iv_n, prefix, e, S, E)
    if ASKS:
        asking, d_asked, common_s, logarithm = _of_asking(
            *(gradient + b * g_b + h * g_h, q + b * q_b + h * q_h, state + b * s_b + h * s_h),
            *(g_n, q_n, prefix, d, e, scale, S, D, E),
        )
        key = rows_of(k + b * k_b + h * k_h, 0, k_n, prefix, d, S, D)
        value = rows_of(v + b * v_b + h * v_h, 0, v_n, prefix, e, S, E)
        weights = tl.exp(scores_of(asking, key, tl.arange(0, S) < prefix, EXACT) - logarithm[:, None])
        of_v += product(tl.trans(weights), d_asked, EXACT)
        d_asking = weights * (product(d_asked, tl.trans(value), EXACT) - common_s[:, None])
        of_k += product(tl.trans(d_asking), asking, EXACT)
        of_q = scale * product(d_asking, key, EXACT) + rows_of(sums, 0, 2 * d + e, prefix, d, S, D)
        store_rows(d_q + b * oq_b + h * oq_h, 0, oq_n, prefix, d, of_q, S, D)
    store_rows(d_k + b * ok_b + h * ok_h, 0, ok_n, prefix, d, of_k, S, D)
    store_rows(d_v + b * ov_b + h * ov_h, 0, ov_n, prefix, e, of_v, S, E)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


@torch.library.custom_op("effvit::window_attention_backward", mutates_args=())
@on_its_device
def attend_backward(
    gradient: Tensor, of_others: Tensor, given: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, state: Tensor,
    windows: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from those of both outputs.

    ``given`` are gradients of queries of patches, of keys and of values, in heads without windows.
    """
    gradient, of_others, q, k, v = (by_rows(x) for x in (gradient, of_others, q, k, v))
    given_q, given_k, given_v = (by_rows(x) for x in given)
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    prefix, d, e, scale = prefix_of(k, windows), q.shape[-1], v.shape[-1], q.shape[-1] ** -0.5
    first = q.shape[2] - windows[1] * windows[2]
    for run in runs_of(windows, q.shape[1]):
        options = options_of(run, prefix, first > 0, q, k, v)
        mixes, asks = options["MIXES"], options["ASKS"]
        d_y = gradient[:, run.heads] if mixes else of_others
        q_, k_, v_, state_, *to = (x[:, run.heads] for x in (q, k, v, state, d_q, d_k, d_v))
        heads = len(q) * q_.shape[1]
        parts = no_tensor(q)
        if prefix and (mixes or asks):
            parts = q.new_empty(heads, run.number, prefix, 2 * d + e, dtype=torch.float32)
        strides = *_strides(d_y, q_, k_, v_), *state_.stride()[:2]
        through_windows[(heads * run.number,)](
            *(d_y, q_, k_, v_, state_, given_q, given_k, given_v, *to, parts),
            *(*strides, *_strides(given_q, given_k, given_v, *to), *run.arguments, prefix, first, d, e, scale),
            **options,
        )
        if prefix:
            through_prefix[(heads,)](
                *(d_y, q_, k_, v_, state_, given_k, given_v, *to, parts.sum(dim=1) if parts.numel() else parts),
                *(*strides, *_strides(given_k, given_v, *to), q_.shape[1], prefix, d, e, scale),
                **{name: options[name] for name in ("MIXES", "ASKS", "EXACT", "S", "D", "E")},
            )
    return d_q, d_k, d_v


@attend_backward.register_fake
def _(
    gradient: Tensor, of_others: Tensor, given: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, state: Tensor,
    windows: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    return d_q, d_k, d_v
