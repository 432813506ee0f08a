"""Softmax attention of each patch in its window of the grid, and to the prefix tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit import policy
from effvit.kernels import choice

_FEW = 80  # tokens that a patch sees


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


def reference(q: Tensor, k: Tensor, v: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """Queries of the patches ``(B, H, P, d)``, keys and values of S + P tokens to ``(B, H, P, e)``.

    The S prefix tokens come first and are seen by every patch. Dropout acts on the probabilities.
    """
    patch = torch.arange(q.shape[-2], device=q.device)
    row, column = patch // windows.columns, patch % windows.columns
    place = torch.stack([*_place(row, windows), *_place(column, windows)])
    sees = (place[:, :, None] == place[:, None]).all(dim=0)  # (P, P): of one phase and one window
    sees = torch.cat([sees.new_ones(len(sees), k.shape[-2] - len(sees)), sees], dim=1)
    scores = ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill(~sees, float("-inf"))
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


def _place(position: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Phase of each row or column, and its window there."""
    r, w = windows.dilation, windows.size
    return position % r, (position // r + (w - windows.shift if windows.shift else 0)) // w


@choice.primitive
def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """`reference` window by window."""
    if policy.ONLY_REFERENCE or choice.in_forward_mode():
        return reference(q, k, v, windows, dropout_p)
    few = windows.size**2 + k.shape[-2] - q.shape[-2] <= _FEW
    if few and choice.on_cpu(q, k, v):
        return written_out(q, k, v, windows, dropout_p)
    if q.device.type == "cpu" and v.dtype in (torch.bfloat16, torch.float16):
        # In half precision a CPU takes four times as long backward on sequences this short.
        with torch.autocast("cpu", enabled=False):
            return by_reshape(q.float(), k.float(), v.float(), windows, dropout_p).to(v.dtype)
    return by_reshape(q, k, v, windows, dropout_p)


def by_reshape(q: Tensor, k: Tensor, v: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """Windows as parts of the grid's own shape: nothing is gathered, and no gradient is scattered."""
    heads, prefix = q.shape[1], k.shape[-2] - q.shape[-2]
    mask = _mask(windows, heads, prefix, q.device)
    keys, values = (_with_prefix(tokens, prefix, windows) for tokens in (k, v))
    y = F.scaled_dot_product_attention(  # (B, H windows, w², e): windows take the place of heads
        to_windows(q, windows), keys, values, attn_mask=mask, dropout_p=dropout_p
    )
    return from_windows(y, heads, windows)


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


def written_out(q: Tensor, k: Tensor, v: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """Each window's probabilities in memory: over so few tokens products are faster than PyTorch's kernel."""
    prefix = k.shape[-2] - q.shape[-2]
    with choice.without_autocast(q):
        queries, keys, values = (Gather.apply(x, s, windows) for x, s in ((q, 0), (k, prefix), (v, prefix)))
        # A column for each query: rows of w² + 1 numbers would leave a rest to every vector instruction.
        scores = torch.baddbmm(queries.new_zeros(1), keys, queries.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        if (mask := _mask(windows, 1, prefix, q.device)) is not None:
            of_samples = scores.unflatten(0, (-1, windows.number)).masked_fill(~mask.mT, float("-inf"))
            scores = of_samples.flatten(0, 1)
        y = torch.bmm(F.dropout(scores.softmax(dim=-2), dropout_p).mT, values)
        return Scatter.apply(y, q.shape[1], 0, windows, v.dtype)


class Gather(torch.autograd.Function):
    """`gather`, whose transpose is `scatter`: PyTorch's own would zero and add to whole tensors part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prefix: int, windows: Windows) -> Tensor:
        ctx.heads, ctx.prefix, ctx.windows, ctx.dtype = x.shape[1], prefix, windows, x.dtype
        return gather(x, prefix, windows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return Scatter.apply(gradients[0], ctx.heads, ctx.prefix, ctx.windows, ctx.dtype), None, None


class Scatter(torch.autograd.Function):
    """`scatter`, whose transpose is `gather`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, heads: int, prefix: int, windows: Windows, dtype: torch.dtype) -> Tensor:
        ctx.prefix, ctx.windows = prefix, windows
        return scatter(y, heads, prefix, windows, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return Gather.apply(gradients[0], ctx.prefix, ctx.windows), None, None, None, None


def gather(x: Tensor, prefix: int, windows: Windows) -> Tensor:
    """Tokens ``(B, H, S + P, e)`` to a copy for each window, ``(B H windows, S + w², e)``, float32 or more."""
    samples, heads, _, e = x.shape
    w, dtype = windows.size, torch.promote_types(x.dtype, torch.float32)
    copies = torch.empty(samples * heads * windows.number, prefix + w * w, e, dtype=dtype, device=x.device)
    by_window = copies.view(samples, heads, *_parts(windows), prefix + w * w, e)
    by_window[..., prefix:, :].unflatten(-2, (w, w)).copy_(_as_windows(_on_grid(x[:, :, prefix:], windows), windows))
    by_window[..., :prefix, :] = x[:, :, None, None, None, None, :prefix]
    return copies


def scatter(y: Tensor, heads: int, prefix: int, windows: Windows, dtype: torch.dtype) -> Tensor:
    """The transpose of `gather`, with sums over the copies of prefix tokens: ``(B, H, S + P, e)``, heads inside."""
    w, e, (rows, columns) = windows.size, y.shape[-1], windows.padded
    by_window = y.view(-1, heads, *_parts(windows), *y.shape[1:])
    samples, patches = len(by_window), windows.rows * windows.columns
    x = y.new_empty(samples, prefix + patches, heads, e, dtype=dtype).transpose(1, 2)
    whole = x[:, :, prefix:] if windows.tile else y.new_empty(samples, rows * columns, heads, e).transpose(1, 2)
    grid = whole.unflatten(2, (rows, columns))
    _as_windows(grid, windows).copy_(by_window[..., prefix:, :].unflatten(-2, (w, w)))
    if not windows.tile:
        shift = windows.shift * windows.dilation
        moved = grid.roll((shift, shift), dims=(2, 3)) if shift else grid
        x[:, :, prefix:] = moved[:, :, : windows.rows, : windows.columns].flatten(2, 3)
    x[:, :, :prefix] = by_window[..., :prefix, :].sum(dim=(2, 3, 4, 5))
    return x


FORMS = {"by reshape": by_reshape, "written out": written_out}
