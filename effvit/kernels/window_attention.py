"""Softmax attention of each patch in its window of the grid, and to the prefix tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit.kernels import choice, softmax_attention


class Windows(NamedTuple):
    """A grid of ``rows x columns`` patches cut into windows of w x w patches that lie ``dilation`` apart.

    The grid is split into dilation² phases (rows and columns modulo the dilation), each phase into windows from its
    first corner on; at the far borders windows hang over the grid. With a ``shift``, all windows begin as many patches
    earlier than w, so that at the near borders they hang over as well.
    """

    rows: int
    columns: int
    size: int
    dilation: int = 1
    shift: int = 0

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the smallest grid that windows tile."""
        span = self.size * self.dilation
        return -(-self.rows // span) * span, -(-self.columns // span) * span

    @property
    def number(self) -> int:
        """Windows that tile the padded grid."""
        return self.area // self.size**2

    @property
    def area(self) -> int:
        """Patches of the padded grid."""
        return self.padded[0] * self.padded[1]

    @property
    def tile(self) -> bool:
        """Whether all windows are whole."""
        return not self.shift and self.padded == (self.rows, self.columns)


OfHeads = Sequence[Windows]
"""Windows of each head."""


def reference(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float = 0.0) -> Tensor:
    """Queries of the patches ``(B, H, P, d)``, keys and values of S + P tokens to ``(B, H, P, e)``.

    The S prefix tokens come first and are seen by every patch. Dropout acts on the probabilities.
    """
    sees = torch.stack([_sees(of_head, q.device) for of_head in windows])
    sees = F.pad(sees, (k.shape[-2] - q.shape[-2], 0), value=True)
    scores = ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill(~sees, float("-inf"))
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


def _sees(windows: Windows, device: torch.device) -> Tensor:
    """Whether patches are of one phase and one window, ``(P, P)``."""
    patch = torch.arange(windows.rows * windows.columns, device=device)
    row, column = patch // windows.columns, patch % windows.columns
    place = torch.stack([*_place(row, windows), *_place(column, windows)])
    return (place[:, :, None] == place[:, None]).all(dim=0)


def _place(position: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Phase of each row or column, and its window there."""
    r, w = windows.dilation, windows.size
    return position % r, (position // r + (w - windows.shift if windows.shift else 0)) // w


def _runs(windows: OfHeads) -> Iterator[tuple[Windows, slice]]:
    """Neighbouring heads that have the same windows."""
    starts = [head for head in range(len(windows)) if not head or windows[head] != windows[head - 1]]
    for start, stop in zip(starts, [*starts[1:], len(windows)], strict=True):
        yield windows[start], slice(start, stop)


def _apart(attend: Callable[..., Tensor], windows: OfHeads, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    """Attend with each run of heads by itself."""
    runs = [(same, heads) for same, heads in _runs(windows)]
    sizes = [heads.stop - heads.start for _, heads in runs]
    # Cut and joined as tokens lie in memory, with a token's heads side by side.
    parts = zip(*(x.transpose(1, 2).split(sizes, dim=2) for x in (q, k, v)), strict=True)
    mixed = [
        attend(*(x.transpose(1, 2) for x in part), [same] * size, *more).transpose(1, 2)
        for (same, _), size, part in zip(runs, sizes, parts, strict=True)
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2)


def by_reshape(q: Tensor, k: Tensor, v: Tensor, of_heads: OfHeads, dropout_p: float = 0.0) -> Tensor:
    """Windows as parts of the grid's own shape: nothing is gathered, and no gradient is scattered."""
    if len(set(of_heads)) > 1:
        return _apart(by_reshape, of_heads, q, k, v, dropout_p)
    windows = of_heads[0]
    heads, prefix = q.shape[1], k.shape[-2] - q.shape[-2]
    mask = _mask(windows, heads, prefix, q.device)
    keys, values = (_with_prefix(tokens, prefix, windows) for tokens in (k, v))
    y = F.scaled_dot_product_attention(  # (B, H windows, w², e): windows take the place of heads
        to_windows(q, windows), keys, values, attn_mask=mask, dropout_p=dropout_p
    )
    return from_windows(y, heads, windows)


def by_reshape_in_float32(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float = 0.0) -> Tensor:
    """`by_reshape` on copies in float32; the result is of ``v``'s precision."""
    with torch.autocast("cpu", enabled=False):
        return by_reshape(q.float(), k.float(), v.float(), windows, dropout_p).to(v.dtype)


def _mask(windows: Windows, heads: int, prefix: int, device: torch.device) -> Tensor | None:
    """What a patch sees of its window, ``(1, H windows, w² or 1, S + w²)``; None where that is everything.

    What is outside the grid sees the rest of its window that is outside as well, and nobody sees it.
    """
    if windows.tile:
        return None
    grid = torch.ones(windows.rows, windows.columns, dtype=torch.int32, device=device)
    if windows.shift:  # of a window that holds both far and near borders, each part sees itself
        row, column = (torch.arange(side, device=device) >= windows.shift * windows.dilation for side in grid.shape)
        grid = grid + row[:, None] * 1 + column * 2
    part = to_windows(grid.view(1, 1, -1, 1), windows).squeeze(-1)  # (1, windows, w²)
    if windows.shift:
        sees = part[:, :, :, None] == part[:, :, None]
    else:
        there = part > 0
        sees = (there | ~there.any(dim=-1, keepdim=True))[:, :, None]
    return F.pad(sees, (prefix, 0), value=True).repeat(1, heads, 1, 1)


def to_windows(x: Tensor, windows: Windows) -> Tensor:
    """Patches ``(B, H, P, e)`` to ``(B, H windows, w², e)``, zeros where a window hangs over the grid."""
    parts = _as_windows(_on_grid(x, windows), windows)
    return parts.reshape(x.shape[0], x.shape[1] * windows.number, windows.size**2, x.shape[-1])


def _parts(windows: Windows) -> tuple[int, int, int, int]:
    """Rows of windows, row phases, columns of windows, column phases."""
    (rows, columns), span = windows.padded, windows.size * windows.dilation
    return rows // span, windows.dilation, columns // span, windows.dilation


def _on_grid(x: Tensor, windows: Windows) -> Tensor:
    """Patches ``(..., P, e)`` to the padded grid ``(..., rows, columns, e)``, moved where windows are."""
    (rows, columns), r = windows.padded, windows.dilation
    x = x.unflatten(-2, (windows.rows, windows.columns))
    if (rows, columns) != (windows.rows, windows.columns):
        x = F.pad(x, (0, 0, 0, columns - windows.columns, 0, rows - windows.rows))
    if windows.shift:
        x = x.roll((-windows.shift * r, -windows.shift * r), dims=(-3, -2))
    return x


def _as_windows(x: Tensor, windows: Windows) -> Tensor:
    """View of a grid ``(..., rows, columns, e)`` as ``(..., *parts, w, w, e)``, see `_parts`."""
    rows, row_phases, columns, column_phases = _parts(windows)
    x = x.unflatten(-2, (columns, windows.size, column_phases)).unflatten(-5, (rows, windows.size, row_phases))
    first = x.ndim - 7  # of rows of windows, w, r, columns of windows, w, r, e
    return x.permute(*range(first), *(first + place for place in (0, 2, 3, 5, 1, 4, 6)))


def from_windows(y: Tensor, heads: int, windows: Windows) -> Tensor:
    """Inverse of `to_windows`: ``(B, H windows, w², e)`` to ``(B, H, P, e)``, with a patch's heads side by side."""
    (rows, columns), w, r = windows.padded, windows.size, windows.dilation
    y = y.reshape(y.shape[0], heads, rows // (w * r), r, columns // (w * r), r, w, w, y.shape[-1])
    y = y.permute(0, 2, 6, 3, 4, 7, 5, 1, 8).reshape(y.shape[0], rows, columns, heads, y.shape[-1])
    if windows.shift:
        y = y.roll((windows.shift * r, windows.shift * r), dims=(1, 2))
    return y[:, : windows.rows, : windows.columns].flatten(1, 2).transpose(1, 2)


def _with_prefix(tokens: Tensor, prefix: int, windows: Windows) -> Tensor:
    """Keys or values ``(B, H, S + P, e)`` of each window with those of the prefix: ``(B, H windows, S + w², e)``."""
    patches = to_windows(tokens[:, :, prefix:], windows)
    if not prefix:
        return patches
    of_prefix = tokens[:, :, None, :prefix].expand(-1, -1, windows.number, -1, -1).flatten(1, 2)
    return torch.cat([of_prefix, patches], dim=2)


def by_copies(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float = 0.0) -> Tensor:
    """PyTorch's kernel on a copy of each window's tokens, made in one pass, whose gradients go back in one pass.

    Heads with as many windows of the same size are one batch, wherever those lie.
    """
    if len({(of_head.number, of_head.size) for of_head in windows}) > 1:
        return _apart(by_copies, windows, q, k, v, dropout_p)
    samples, prefix = len(q), k.shape[-2] - q.shape[-2]
    copies = (Gather.apply(x, s, windows, x.dtype) for x, s in ((q, 0), (k, prefix), (v, prefix)))
    queries, keys, values = (x.unflatten(0, (samples, -1)) for x in copies)  # (B, H windows, S + w², e)
    mask = None
    if not all(of_head.tile for of_head in windows):
        mask = torch.cat([_whole_mask(of_head, prefix, q.device) for of_head in windows], dim=1)
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout_p)
    return Scatter.apply(y.flatten(0, 1), 0, windows, v.dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float = 0.0) -> Tensor:
    """Each window's probabilities in memory: over so few tokens products are faster than PyTorch's kernel.

    Heads with as many windows of the same size are one batch, wherever those lie.
    """
    if len({(of_head.number, of_head.size) for of_head in windows}) > 1:
        return _apart(written_out, windows, q, k, v, dropout_p)
    prefix = k.shape[-2] - q.shape[-2]
    with choice.without_autocast(q):
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (Gather.apply(x, s, windows, dtype) for x, s in ((q, 0), (k, prefix), (v, prefix)))
        # A column for each query: rows of w² + 1 numbers would leave a rest to every vector instruction.
        scores = torch.baddbmm(queries.new_zeros(1), keys, queries.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        if not all(of_head.tile for of_head in windows):
            mask = torch.cat([_whole_mask(of_head, prefix, q.device) for of_head in windows], dim=1)
            of_samples = scores.unflatten(0, (-1, mask.shape[1])).masked_fill(~mask.mT, float("-inf"))
            scores = of_samples.flatten(0, 1)
        y = torch.bmm(F.dropout(scores.softmax(dim=-2), dropout_p).mT, values)
        return Scatter.apply(y, 0, windows, v.dtype)


def _whole_mask(windows: Windows, prefix: int, device: torch.device) -> Tensor:
    """`_mask` of one head, ``(1, windows, w², S + w²)``, also where all is seen."""
    mask = _mask(windows, 1, prefix, device)
    size = windows.size**2
    if mask is None:
        mask = torch.ones(1, windows.number, 1, prefix + size, dtype=torch.bool, device=device)
    return mask.expand(-1, -1, size, -1)


class Gather(torch.autograd.Function):
    """`gather`, whose transpose is `scatter`: PyTorch's own would zero and add to whole tensors part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prefix: int, windows: OfHeads, dtype: torch.dtype) -> Tensor:
        ctx.prefix, ctx.windows, ctx.dtype = prefix, windows, x.dtype
        return gather(x, prefix, windows, dtype)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return Scatter.apply(gradients[0], ctx.prefix, ctx.windows, ctx.dtype), None, None, None


class Scatter(torch.autograd.Function):
    """`scatter`, whose transpose is `gather`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, prefix: int, windows: OfHeads, dtype: torch.dtype) -> Tensor:
        ctx.prefix, ctx.windows, ctx.dtype = prefix, windows, y.dtype
        return scatter(y, prefix, windows, dtype)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return Gather.apply(gradients[0], ctx.prefix, ctx.windows, ctx.dtype), None, None, None


def gather(x: Tensor, prefix: int, of_heads: OfHeads, dtype: torch.dtype) -> Tensor:
    """Tokens ``(B, H, S + P, e)`` to a copy for each window, ``(B H windows, S + w², e)``."""
    samples, heads, _, e = x.shape
    w, number = of_heads[0].size, of_heads[0].number
    copies = x.new_empty(samples * heads * number, prefix + w * w, e, dtype=dtype)
    by_head = copies.view(samples, heads, number, prefix + w * w, e)
    for windows, mine in _runs(of_heads):
        parts = by_head[:, mine, :, prefix:].unflatten(2, _parts(windows)).unflatten(-2, (w, w))
        parts.copy_(_as_windows(_on_grid(x[:, mine, prefix:], windows), windows))
    if prefix:
        by_head[..., :prefix, :] = x[:, :, None, :prefix]
    return copies


def scatter(y: Tensor, prefix: int, of_heads: OfHeads, dtype: torch.dtype) -> Tensor:
    """The transpose of `gather`, with sums over the copies of prefix tokens: ``(B, H, S + P, e)``, heads inside."""
    first, heads, e = of_heads[0], len(of_heads), y.shape[-1]
    by_head = y.view(-1, heads, first.number, *y.shape[1:])
    x = y.new_empty(len(by_head), prefix + first.rows * first.columns, heads, e, dtype=dtype).transpose(1, 2)
    for windows, mine in _runs(of_heads):
        parts = by_head[:, mine, :, prefix:].unflatten(2, _parts(windows)).unflatten(-2, (windows.size,) * 2)
        place = x[:, mine, prefix:]
        if windows.tile:
            _as_windows(place.unflatten(2, windows.padded), windows).copy_(parts)
            continue
        grid = y.new_empty(len(place), *windows.padded, place.shape[1], e).permute(0, 3, 1, 2, 4)
        _as_windows(grid, windows).copy_(parts)
        shift = windows.shift * windows.dilation
        moved = grid.roll((shift, shift), dims=(2, 3)) if shift else grid
        place.copy_(moved[:, :, : windows.rows, : windows.columns].flatten(2, 3))
    if prefix:
        x[:, :, :prefix] = by_head[..., :prefix, :].sum(dim=2)
    return x


def in_triton(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float = 0.0) -> Tensor:
    """By `effvit.kernels.cuda`, without dropout."""
    assert not dropout_p, "no form with dropout"
    return tokens_in_triton(q, k, v, windows)[0]


def tokens_in_triton(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads) -> tuple[Tensor, ...]:
    """By `effvit.kernels.cuda`, where tokens lie. Queries of the patches, or of all tokens.

    With more heads than windows there are five results: outputs of the first heads; outputs of the prefix tokens in the
    other heads; and these heads' queries of patches, keys and values. What is made of those three has its gradients
    written to the same memory as all others, without a copy of the whole.
    """
    return InTriton.apply(q, k, v, windows)


class InTriton(torch.autograd.Function):
    """Training keeps q, k, v and outputs of prefix tokens; probabilities are computed again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, windows: OfHeads) -> tuple[Tensor, ...]:
        from effvit.kernels.cuda.window_attention import attend

        y, of_prefix, state = attend(q, k, v, _as_numbers(windows))
        ctx.save_for_backward(q, k, v, state)
        ctx.windows = windows
        return (y, of_prefix, *_others(q, k, v, windows)) if len(windows) < q.shape[1] else (y,)

    @staticmethod
    @choice.one_at_a_time
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from effvit.kernels.cuda.window_gradients import attend_backward

        q, k, v, state = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *choice.through_equation(lambda q, k, v: _equation(q, k, v, ctx.windows), (q, k, v), gradients), None
        of_y, *of_others = gradients
        of_prefix, *given = of_others or (of_y[:, :0], *_others(q, k, v, ctx.windows))
        return *attend_backward(of_y, of_prefix, given, q, k, v, state, _as_numbers(ctx.windows)), None


def _others(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of patches, keys and values of heads without windows."""
    h, patches = len(windows), windows[0].rows * windows[0].columns
    return q[:, h:, q.shape[2] - patches :], k[:, h:], v[:, h:]


def _equation(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads) -> tuple[Tensor, ...]:
    """What `tokens_in_triton` returns, by references."""
    h, prefix = len(windows), q.shape[2] - windows[0].rows * windows[0].columns
    of_prefix = softmax_attention.reference(q[:, :, :prefix], k, v)
    patches = reference(q[:, :h, prefix:], k[:, :h], v[:, :h], windows)
    y = torch.cat([of_prefix[:, :h], patches], dim=2)
    return (y, of_prefix[:, h:], *_others(q, k, v, windows)) if h < q.shape[1] else (y,)


def _as_numbers(windows: OfHeads) -> list[int]:
    """Number of heads and windows of each run, as operators take them."""
    return [number for same, heads in _runs(windows) for number in (heads.stop - heads.start, *same)]


FORMS = {
    "by reshape": by_reshape,
    "by reshape, in float32": by_reshape_in_float32,
    "written out": written_out,
    "by copies": by_copies,
}
