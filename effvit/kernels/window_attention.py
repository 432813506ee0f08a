"""Softmax attention of each patch in its window of the grid, and to the prefix tokens."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit import policy
from effvit.kernels import choice


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
        return self.padded[0] * self.padded[1] // self.size**2


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
    if not windows.shift and windows.padded == (windows.rows, windows.columns):
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
    (rows, columns), w, r = windows.padded, windows.size, windows.dilation
    x = x.unflatten(2, (windows.rows, windows.columns))
    if (rows, columns) != (windows.rows, windows.columns):
        x = F.pad(x, (0, 0, 0, columns - windows.columns, 0, rows - windows.rows))
    if windows.shift:
        x = x.roll((-windows.shift * r, -windows.shift * r), dims=(2, 3))
    x = x.unflatten(3, (columns // (w * r), w, r)).unflatten(2, (rows // (w * r), w, r))
    # (B, H, rows of windows, w, r, columns of windows, w, r, e)
    return x.permute(0, 1, 2, 4, 5, 7, 3, 6, 8).reshape(x.shape[0], x.shape[1] * windows.number, w * w, x.shape[-1])


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


FORMS = {"by reshape": by_reshape}
