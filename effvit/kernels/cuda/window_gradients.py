"""Gradients of `window_attention`, window by window; probabilities are computed again.

A program writes the gradients of its window's tokens. Every window has a part of those of prefix tokens; parts are
added up in the order of windows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effvit.kernels.cuda.blocks import by_rows, like_heads, on_its_device, product, rows_of, store_rows
from effvit.kernels.cuda.windows import (
    COLUMNS,
    STRIP,
    largest_of,
    no_tensor,
    options_of,
    patches_of,
    place,
    prefix_of,
    products_of,
    rows_at,
    runs_of,
    scores_of,
    store_at,
)


@triton.jit
def _of_asking(
    gradient, q, k, v, state, of_k, in_k, g_n, q_n, k_n, v_n, prefix, d, e, scale, EXACT: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, E: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Probabilities P of some keys for prefix tokens, and gradients P (∂P - ∂y · y) of their scores."""
    s = tl.arange(0, S)
    scores = scores_of(q, k, s, of_k, s < prefix, in_k, q_n, k_n, d, scale, EXACT, S, B, AT_ONCE)
    p = tl.exp(scores - tl.load(state + s * (e + 1) + e, mask=s < prefix, other=0.0)[:, None])
    d_p = products_of(gradient, v, s, of_k, s < prefix, in_k, g_n, v_n, e, EXACT, S, B, AT_ONCE)
    d_y = rows_of(gradient, 0, g_n, prefix, e, S, E)
    return p, p * (d_p - tl.sum(d_y * rows_of(state, 0, e + 1, prefix, e, S, E), axis=1)[:, None])


@triton.jit
def through_windows(
    gradient, q, k, v, state, given_q, given_k, given_v, d_q, d_k, d_v, parts,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h,
    iq_b, iq_h, iq_n, ik_b, ik_h, ik_n, iv_b, iv_h, iv_n, oq_b, oq_h, oq_n, ok_b, ok_h, ok_n, ov_b, ov_h, ov_n,
    heads, number, rows, columns, size, dilation, before, down, across, prefix, first, d, e, scale,
    MIXES: tl.constexpr, PREFIX: tl.constexpr, ASKS: tl.constexpr, EXACT: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, D: tl.constexpr, E: tl.constexpr, AT_ONCE: tl.constexpr,
    OF_Q: tl.constexpr, OF_K: tl.constexpr,
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
    tokens, there = patches_of(window, 0, rows, columns, size, dilation, before, down, across, W)
    keys, s = prefix + tokens, tl.arange(0, S)
    is_prefix = s < prefix
    of_k = tl.zeros((W, D), tl.float32)
    of_v = tl.zeros((W, E), tl.float32)
    if not MIXES:
        passed = rows_at(given_q + b * iq_b + h * iq_h, tokens, there, iq_n, d, D)
        store_at(d_q, first + tokens, there, oq_n, d, passed, D)
        of_k += rows_at(given_k + b * ik_b + h * ik_h, keys, there, ik_n, d, D)
        of_v += rows_at(given_v + b * iv_b + h * iv_h, keys, there, iv_n, e, E)
    if ASKS:
        state += b * s_b + h * s_h
        p, d_scores = _of_asking(
            gradient, q, k, v, state, keys, there, g_n, q_n, k_n, v_n, prefix, d, e, scale, EXACT, S, W, E, AT_ONCE
        )
        if OF_K:
            of_v += product(tl.trans(p), rows_of(gradient, 0, g_n, prefix, e, S, E), EXACT)
            of_k += product(tl.trans(d_scores), scale * rows_of(q, 0, q_n, prefix, d, S, D), EXACT)
        if OF_Q:
            for column in range(0, d, AT_ONCE):
                of_q = product(d_scores, rows_at(k + column, keys, there, k_n, d - column, AT_ONCE), EXACT)
                store_rows(parts + column, 0, 2 * d + e, prefix, d - column, scale * of_q, S, AT_ONCE)
    if MIXES:
        of_k_s = tl.zeros((S, D), tl.float32)
        of_v_s = tl.zeros((S, E), tl.float32)
        for start in range(0, size * size, STRIP):
            mine, is_mine = patches_of(window, start, rows, columns, size, dilation, before, down, across, STRIP)
            at = first + mine
            scores = scores_of(q, k, at, keys, is_mine, there, q_n, k_n, d, scale, EXACT, STRIP, W, AT_ONCE)
            d_p = products_of(gradient, v, at, keys, is_mine, there, g_n, v_n, e, EXACT, STRIP, W, AT_ONCE)
            largest = largest_of(scores)
            if PREFIX:
                to_prefix = scores_of(q, k, at, s, is_mine, is_prefix, q_n, k_n, d, scale, EXACT, STRIP, S, AT_ONCE)
                d_p_s = products_of(gradient, v, at, s, is_mine, is_prefix, g_n, v_n, e, EXACT, STRIP, S, AT_ONCE)
                largest = tl.maximum(largest, tl.max(to_prefix, axis=1))
            p = tl.exp(scores - largest[:, None])
            total = tl.sum(p, axis=1)
            if PREFIX:
                p_s = tl.exp(to_prefix - largest[:, None])
                total += tl.sum(p_s, axis=1)
            total = tl.where(is_mine, total, 1.0)
            p /= total[:, None]
            common = tl.sum(p * d_p, axis=1)
            if PREFIX:
                p_s /= total[:, None]
                common += tl.sum(p_s * d_p_s, axis=1)
                d_scores_s = p_s * (d_p_s - common[:, None])
            d_scores = p * (d_p - common[:, None])
            if OF_K:
                d_y = rows_at(gradient, at, is_mine, g_n, e, E)
                of_v += product(tl.trans(p), d_y, EXACT)
                query = scale * rows_at(q, at, is_mine, q_n, d, D)
                of_k += product(tl.trans(d_scores), query, EXACT)
                if PREFIX:
                    of_v_s += product(tl.trans(p_s), d_y, EXACT)
                    of_k_s += product(tl.trans(d_scores_s), query, EXACT)
            if OF_Q:
                for column in range(0, d, AT_ONCE):
                    of_q = product(d_scores, rows_at(k + column, keys, there, k_n, d - column, AT_ONCE), EXACT)
                    if PREFIX:
                        of_q += product(d_scores_s, rows_of(k + column, 0, k_n, prefix, d - column, S, AT_ONCE), EXACT)
                    store_at(d_q + column, at, is_mine, oq_n, d - column, scale * of_q, AT_ONCE)
        if OF_K and PREFIX:
            store_rows(parts + d, 0, 2 * d + e, prefix, d, of_k_s, S, D)
            store_rows(parts + 2 * d, 0, 2 * d + e, prefix, e, of_v_s, S, E)
    if OF_K:
        store_at(d_k + b * ok_b + h * ok_h, keys, there, ok_n, d, of_k, D)
        store_at(d_v + b * ov_b + h * ov_h, keys, there, ov_n, e, of_v, E)


@triton.jit
def through_prefix(
    gradient, q, k, v, state, given_k, given_v, d_q, d_k, d_v, sums,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h,
    ik_b, ik_h, ik_n, iv_b, iv_h, iv_n, oq_b, oq_h, oq_n, ok_b, ok_h, ok_n, ov_b, ov_h, ov_n,
    heads, prefix, d, e, scale, MIXES: tl.constexpr, ASKS: tl.constexpr, EXACT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, E: tl.constexpr, AT_ONCE: tl.constexpr,
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
        gradient += b * g_b + h * g_h
        q += b * q_b + h * q_h
        k += b * k_b + h * k_h
        s = tl.arange(0, S)
        p, d_scores = _of_asking(
            *(gradient, q, k, v + b * v_b + h * v_h, state + b * s_b + h * s_h),
            *(s, s < prefix, g_n, q_n, k_n, v_n, prefix, d, e, scale, EXACT, S, S, E, AT_ONCE),
        )
        of_v += product(tl.trans(p), rows_of(gradient, 0, g_n, prefix, e, S, E), EXACT)
        of_k += product(tl.trans(d_scores), scale * rows_of(q, 0, q_n, prefix, d, S, D), EXACT)
        of_q = scale * product(d_scores, rows_of(k, 0, k_n, prefix, d, S, D), EXACT)
        of_q += rows_of(sums, 0, 2 * d + e, prefix, d, S, D)
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
        mixes, asks, exact, width = (options[name] for name in ("MIXES", "ASKS", "EXACT", "D"))
        options["AT_ONCE"] = min(COLUMNS, width) if exact or not mixes else width
        d_y = gradient[:, run.heads] if mixes else of_others
        q_, k_, v_, state_, *to = (x[:, run.heads] for x in (q, k, v, state, d_q, d_k, d_v))
        heads = len(q) * q_.shape[1]
        parts = no_tensor(q)
        if prefix and (mixes or asks):
            parts = q.new_empty(heads, run.number, prefix, 2 * d + e, dtype=torch.float32)
        strides = *_strides(d_y, q_, k_, v_), *state_.stride()[:2]
        # All at once, exact products for so many keys would not fit into registers.
        in_two = mixes and exact and options["W"] > 32
        for of_q, of_k in ((True, False), (False, True)) if in_two else ((True, True),):
            through_windows[(heads * run.number,)](
                *(d_y, q_, k_, v_, state_, given_q, given_k, given_v, *to, parts),
                *(*strides, *_strides(given_q, given_k, given_v, *to), *run.arguments, prefix, first, d, e, scale),
                OF_Q=of_q,
                OF_K=of_k,
                **options,
            )
        if prefix:
            through_prefix[(heads,)](
                *(d_y, q_, k_, v_, state_, given_k, given_v, *to, parts.sum(dim=1) if parts.numel() else parts),
                *(*strides, *_strides(given_k, given_v, *to), q_.shape[1], prefix, d, e, scale),
                **{name: options[name] for name in ("MIXES", "ASKS", "EXACT", "S", "D", "E", "AT_ONCE")},
            )
    return d_q, d_k, d_v


@attend_backward.register_fake
def _(
    gradient: Tensor, of_others: Tensor, given: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, state: Tensor,
    windows: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (like_heads(x, x.shape[-1], x.dtype) for x in (q, k, v))
    return d_q, d_k, d_v
