"""Softmax attention of patches in their windows and to the prefix tokens, and of prefix tokens to all, in one pass.

A program has one window of one head. It finds the window's tokens where they lie and writes their outputs there. What
prefix tokens make of its keys is a part of a sum over windows, which `join_windows` adds up in their order.

A head's ``state`` is what the backward pass needs of its prefix tokens: outputs ``(S, e)`` and the logarithms of their
sums of exponentials.
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
    rows_at,
    runs_of,
    scores_of,
    store_at,
)

_BLOCK = tl.constexpr(32)  # windows


@triton.jit
def mix_windows(
    q, k, v, y, parts, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, y_b, y_h, y_n,
    heads, number, rows, columns, size, dilation, before, down, across, prefix, first, d, e, scale,
    MIXES: tl.constexpr, PREFIX: tl.constexpr, ASKS: tl.constexpr, EXACT: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, E: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Outputs of a window's patches, whose queries begin at ``first``, and parts of those of the prefix tokens."""
    b, h, window = place(tl.program_id(0), heads, number)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    tokens, there = patches_of(window, 0, rows, columns, size, dilation, before, down, across, W)
    s = tl.arange(0, S)
    is_prefix = s < prefix
    if MIXES:
        y += b * y_b + h * y_h
        for start in range(0, size * size, STRIP):
            mine, is_mine = patches_of(window, start, rows, columns, size, dilation, before, down, across, STRIP)
            at, keys = first + mine, prefix + tokens
            scores = scores_of(q, k, at, keys, is_mine, there, q_n, k_n, d, scale, EXACT, STRIP, W, AT_ONCE)
            largest = largest_of(scores)
            if PREFIX:
                to_prefix = scores_of(q, k, at, s, is_mine, is_prefix, q_n, k_n, d, scale, EXACT, STRIP, S, AT_ONCE)
                largest = tl.maximum(largest, tl.max(to_prefix, axis=1))
            p = tl.exp(scores - largest[:, None])
            total = tl.sum(p, axis=1)
            out = product(p, rows_at(v, keys, there, v_n, e, E), EXACT)
            if PREFIX:
                p = tl.exp(to_prefix - largest[:, None])
                total += tl.sum(p, axis=1)
                out += product(p, rows_of(v, 0, v_n, prefix, e, S, E), EXACT)
            store_at(y, at, is_mine, y_n, e, out / tl.where(is_mine, total, 1.0)[:, None], E)
    if ASKS:
        scores = scores_of(q, k, s, prefix + tokens, is_prefix, there, q_n, k_n, d, scale, EXACT, S, W, AT_ONCE)
        largest = largest_of(scores)
        p = tl.exp(scores - largest[:, None])
        out = product(p, rows_at(v, prefix + tokens, there, v_n, e, E), EXACT)
        parts += ((b * heads + h) * number + window) * prefix * (e + 2)
        store_rows(parts, 0, e + 2, prefix, e, out, S, E)
        tl.store(parts + s * (e + 2) + e, tl.sum(p, axis=1), mask=is_prefix)
        tl.store(parts + s * (e + 2) + e + 1, largest, mask=is_prefix)


@triton.jit
def join_windows(
    q, k, v, y, parts, state, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, y_b, y_h, y_n, s_b, s_h,
    heads, number, prefix, d, e, scale, S: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Output of a prefix token, from the keys of prefix tokens and the parts of all windows, and its state."""
    s, head = tl.program_id(0) % prefix, tl.program_id(0) // prefix
    b, h = (head // heads).to(tl.int64), head % heads
    q += b * q_b + h * q_h + s * q_n
    key = rows_of(k + b * k_b + h * k_h, 0, k_n, prefix, d, S, D)
    value = rows_of(v + b * v_b + h * v_h, 0, v_n, prefix, e, S, E)
    of_q, columns = tl.arange(0, D), tl.arange(0, E)
    query = scale * tl.load(q + of_q, mask=of_q < d, other=0.0).to(tl.float32)
    scores = tl.where(tl.arange(0, S) < prefix, tl.sum(key * query[None, :], axis=1), float("-inf"))
    largest = tl.max(scores, axis=0)
    p = tl.exp(scores - largest)
    total, out = tl.sum(p, axis=0), tl.sum(p[:, None] * value, axis=0)
    for start in range(0, number, _BLOCK):
        window = start + tl.arange(0, _BLOCK)
        at = parts + ((head.to(tl.int64) * number + window) * prefix + s) * (e + 2)
        of_window = tl.load(at + e + 1, mask=window < number, other=float("-inf"))
        most = tl.maximum(largest, tl.max(of_window, axis=0))
        weights, before = tl.exp(of_window - most), tl.exp(largest - most)
        total = total * before + tl.sum(weights * tl.load(at + e, mask=window < number, other=0.0), axis=0)
        is_any = (window < number)[:, None] & (columns < e)[None, :]
        part = tl.load(at[:, None] + columns[None, :], mask=is_any, other=0.0)
        out = out * before + tl.sum(weights[:, None] * part, axis=0)
        largest = most
    out /= total
    y += b * y_b + h * y_h + s * y_n
    tl.store(y + columns, out.to(y.dtype.element_ty), mask=columns < e)
    state += b * s_b + h * s_h + s * (e + 1)
    tl.store(state + columns, out, mask=columns < e)
    tl.store(state + e, largest + tl.log(total))


@torch.library.custom_op("effvit::window_attention", mutates_args=())
@on_its_device
def attend(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``(B, h, rows of q, e)`` of heads with windows, see `runs_of`, and of the others' prefix, and states.

    Queries are those of the patches, or of all tokens.
    """
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    y, of_others, state = _results(q, k, v, windows)
    prefix, d, e, scale = prefix_of(k, windows), q.shape[-1], v.shape[-1], q.shape[-1] ** -0.5
    first = q.shape[2] - windows[1] * windows[2]
    for run in runs_of(windows, q.shape[1]):
        options = options_of(run, prefix, first > 0, q, k, v)
        width = options.pop("D")
        at_once = width if options["EXACT"] or options["W"] <= 32 else min(COLUMNS, width)
        if not run.mixes and not options["ASKS"]:
            continue
        q_, k_, v_ = (x[:, run.heads] for x in (q, k, v))
        to = y[:, run.heads] if run.mixes else of_others
        parts = no_tensor(q)
        if options["ASKS"]:
            parts = q.new_empty(len(q) * q_.shape[1], run.number, prefix, e + 2, dtype=torch.float32)
        strides = tuple(stride for x in (q_, k_, v_, to) for stride in x.stride()[:3])
        mix_windows[(len(q) * q_.shape[1] * run.number,)](
            *(q_, k_, v_, to, parts, *strides, *run.arguments, prefix, first, d, e, scale),
            AT_ONCE=at_once,
            **options,
        )
        if options["ASKS"]:
            join_windows[(len(q) * q_.shape[1] * prefix,)](
                *(q_, k_, v_, to, parts, state[:, run.heads], *strides, *state.stride()[:2]),
                *(q_.shape[1], run.number, prefix, d, e, scale),
                S=options["S"],
                D=width,
                E=options["E"],
            )
    return y, of_others, state


def _results(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """New memory for what `attend` returns."""
    e, h = v.shape[-1], sum(windows[::6])
    asking = q.shape[2] - windows[1] * windows[2]
    y, of_others = like_heads(q[:, :h], e, v.dtype), like_heads(q[:, h:, :asking], e, v.dtype)
    return y, of_others, q.new_empty(*q.shape[:2], asking, e + 1, dtype=torch.float32)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, k, v, windows)
