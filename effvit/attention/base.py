"""The attention contract: what every mechanism shares, and what it must say for itself.

Shapes: B batch, N = S + P tokens (S prefix tokens such as the class token, then P = gh*gw patches, row-major), C width,
H heads, d = C / H.
"""

from typing import Any, ClassVar, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor, nn
from torch.fx import Proxy

from effvit.errors import UserError
from effvit.kernels.choice import is_plain_depthwise
from effvit.kernels.dispatch import grid_convolution
from effvit.kernels.layers import apply_linear, apply_qkv

Grid = tuple[int, int]


def _distinct(values: list[Any]) -> list[Any]:
    if not values or len(set(values)) != len(values):
        raise ValueError("must name at least one, each once")
    return values


DISTINCT = AfterValidator(_distinct)  # of a list, as an option


class AttentionOptions(BaseModel):
    """Options of one mechanism, with the rules that make them valid. Subclasses add the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def check_grid(self, grid_size: Grid, prefix_tokens: int = 1) -> None:
        """Raise ``UserError`` where the options do not fit the patch grid. Nothing to check by default."""


class Attention(nn.Module):
    """Multi-head self-attention of which only the mixing of tokens varies.

    A mechanism implements ``attend`` and ``mixing_macs``. It must be linear in ``v`` for given ``q``, ``k`` and
    context, so that the N x N matrix it implies is ``attend(q, k, I)``: that is how ``return_map`` works for all.

    With ``value_conv`` w the values of the patches, convolved with a w x w kernel for each channel, are added to what
    is mixed. In the matrix they count by the mean kernel of a head's channels.

    Dropout of attention probabilities acts on the factor that multiplies the values from the left, where a
    mechanism has no N x N matrix to drop from (each says which); it stays unbiased and linear in ``v``.

    A mechanism's capabilities are class attributes: ``needs_grid`` where it matters how patches lie in the grid,
    ``fixed_length`` where weights belong to a number of tokens, ``has_map`` where an N x N matrix is implied, ``exact``
    where that is softmax(q kᵀ / √d). What needs neither takes any number of tokens.
    """

    Options: ClassVar[type[AttentionOptions]] = AttentionOptions
    complexity: ClassVar[str]
    paper: ClassVar[str]
    needs_grid: ClassVar[bool] = False
    fixed_length: ClassVar[bool] = False
    has_map: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        options: AttentionOptions,
        *,
        prefix_tokens: int = 1,
        layer: int = 0,
        depth: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        value_conv: int = 0,
    ) -> None:
        super().__init__()
        self._tables: dict[str, Tensor] = {}
        options.check_grid(grid_size, prefix_tokens)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.grid_size, self.prefix_tokens, self.options = grid_size, prefix_tokens, options
        self.num_patches = grid_size[0] * grid_size[1]
        self.num_tokens = prefix_tokens + self.num_patches
        self.layer, self.depth = layer, depth
        self.attn_drop = attn_drop
        self.build_maps(qkv_bias)
        self.value_conv_size = value_conv
        self.value_conv = (
            nn.Conv2d(dim, dim, value_conv, padding=value_conv // 2, groups=dim, bias=False) if value_conv else None
        )
        self.reset_value_conv()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def build_maps(self, qkv_bias: bool) -> None:
        """Create the maps from tokens to queries, keys and values: one merged map, rows in the order q, k, v."""
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=qkv_bias)

    def register_table(self, name: str, table: Tensor | None) -> None:
        """A buffer that is made of the grid: not in the state dict; `table` gives it with its values.

        Args:
            name: of the buffer.
            table: on the CPU, also where the module is built on another device.
        """
        default = torch.empty(0).device
        there = table if table is None or default.type == "meta" else table.to(default)
        self.register_buffer(name, there, persistent=False)
        if table is not None:
            self._tables[name] = table

    def table(self, name: str, x: Tensor) -> Any:
        """A table, or None, for tokens ``x``: also where those have no memory, or weights came into what had none."""
        table = getattr(self, name)
        if table is not None and not isinstance(x, Proxy) and table.is_meta != x.is_meta:
            return self._tables[name].to(x.device)
        return table

    def _apply(self, fn: Any, recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)
        for name, table in self._tables.items():
            self.register_buffer(name, table.to(self.get_buffer(name)), persistent=False)
        return self

    def forward(self, x: Tensor, return_map: bool = False) -> Any:
        """Mix the tokens of each sample.

        Args:
            x: tokens of shape ``(B, N, C)``.
            return_map: also return the implied attention matrix.

        Returns:
            Tokens ``(B, N, C)``; with ``return_map`` a pair of those and the matrix ``(B, H, N, N)``.
        """
        if not isinstance(x, Proxy):  # whose shape torch.fx does not know
            self.check_shape(x)
        q, k, v, *context = self.project(x)
        if not return_map:
            return self.merge(self.add_value_conv(self.attend(q, k, v, *context), x, v))
        # One pass over [v, I], so that both parts see the same dropout mask.
        both = self.attend(q, k, torch.cat([v, self.map_values(v)], dim=-1), *context)
        y, attention_map = both.split([self.head_dim, x.shape[1]], dim=-1)
        return self.merge(self.add_value_conv(y, x, v)), attention_map + self.value_conv_map(y)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens ``(B, N, C)`` to q, k, v ``(B, H, N, d)``; anything after them is passed on to ``attend``."""
        q, k, v = apply_qkv(self.qkv, x)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def check_shape(self, x: Tensor) -> None:
        """Raise ``UserError`` where these are not the tokens that the module is made for."""
        one_length = self.needs_grid or self.fixed_length or self.value_conv is not None
        wanted = self.num_tokens if one_length else x.shape[1] if x.ndim == 3 else None
        if x.shape[1:] != (wanted, self.dim):
            rows, columns = self.grid_size
            raise UserError(
                f"attention: got tokens of shape {tuple(x.shape)}, expected (batch, {self.num_tokens}, {self.dim}): "
                f"{self.prefix_tokens} prefix tokens and {rows} x {columns} patches of width {self.dim}"
            )

    def split_heads(self, x: Tensor) -> Tensor:
        """``(B, rows, C)`` to ``(B, H, rows, d)``, without a copy."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        """Mix values ``(B, H, N, e)`` of any width e into ``(B, H, N, e)``, linearly in ``v``."""
        raise NotImplementedError

    def map_values(self, v: Tensor) -> Tensor:
        """Values for which ``attend`` returns the implied matrix: the identity over tokens, ``(B, H, N, N)``."""
        eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
        return eye.expand(*v.shape[:2], -1, -1)

    def merge(self, y: Tensor) -> Tensor:
        """Heads ``(B, H, N, d)`` to tokens ``(B, N, C)``, through the output projection."""
        return self.proj_drop(apply_linear(self.proj, y.transpose(1, 2).flatten(2)))

    def add_value_conv(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """Mixed values ``(B, H, N, d)`` plus ``value_conv`` of the patches' own, where there is one."""
        if self.value_conv is None:
            return y
        tokens, patches = y.transpose(1, 2).flatten(2), self.patch_values(x, v)
        if is_plain_depthwise(self.value_conv):
            return self.split_heads(grid_convolution(tokens, patches, self.value_conv.weight[:, 0], self.grid_size))
        convolved = self.value_conv(patches.transpose(1, 2).unflatten(2, self.grid_size)).flatten(2).transpose(1, 2)
        return self.split_heads(tokens + nn.functional.pad(convolved, (0, 0, self.prefix_tokens, 0)))

    def patch_values(self, x: Tensor, v: Tensor) -> Tensor:
        """Values of the patches ``(B, P, C)``, from the tokens ``(B, N, C)`` or what `project` made of them."""
        return v.transpose(1, 2).flatten(2)[:, self.prefix_tokens :]

    def value_conv_map(self, y: Tensor) -> Tensor | int:
        """Matrix ``(H, N, N)`` of ``value_conv``, by the mean kernel of each head's channels; 0 without it."""
        if self.value_conv is None:
            return 0
        n, p, h = self.num_tokens, self.num_patches, self.num_heads
        if not is_plain_depthwise(self.value_conv):  # the same patch in all channels
            patches = torch.eye(p, dtype=y.dtype, device=y.device).view(p, 1, *self.grid_size)
            called = self.value_conv(patches.expand(-1, self.dim, -1, -1)).unflatten(1, (h, -1)).mean(2)
            return nn.functional.pad(called.flatten(2).permute(1, 2, 0), (self.prefix_tokens, 0, self.prefix_tokens, 0))
        kernels = self.value_conv.weight.to(y.dtype).unflatten(0, (h, -1)).mean(dim=(1, 2))  # (H, w, w)
        eye = torch.eye(p, dtype=y.dtype, device=y.device).repeat(1, h)[None]  # (1, P, H P)
        nothing = eye.new_zeros(1, n, eye.shape[-1])
        columns = grid_convolution(nothing, eye, kernels.repeat_interleave(p, dim=0), self.grid_size)
        return nn.functional.pad(columns[0].unflatten(-1, (-1, p)).transpose(0, 1), (self.prefix_tokens, 0))

    @property
    def dropout_p(self) -> float:
        """Probability with which attention is dropped right now: 0 in eval mode."""
        return self.attn_drop if self.training else 0.0

    def macs(self) -> int:
        """Multiply-adds of one forward pass for one sample, in closed form.

        Bias, softmax, exp, normalisation and pooling are not counted.
        """
        return self.map_macs() + self.mixing_macs() + self.value_conv_macs()

    def map_macs(self) -> int:
        """MACs of the query, key, value and output maps: 4NC²."""
        return 4 * self.num_tokens * self.dim**2

    def mixing_macs(self) -> int:
        """MACs of everything between the maps."""
        raise NotImplementedError

    def value_conv_macs(self) -> int:
        """MACs of ``value_conv`` w: w²PC."""
        return self.value_conv_size**2 * self.num_patches * self.dim

    def reset_value_conv(self) -> None:
        """Have ``value_conv`` start as a twentieth of the values' own size, so that mixing leads."""
        if self.value_conv is not None:
            nn.init.trunc_normal_(self.value_conv.weight, std=0.05 / self.value_conv_size)

    def reset_mechanism(self) -> None:
        """Set what the mechanism starts from, where a model's common initialisation must not touch it."""

    def share_with(self, first: "Attention") -> None:
        """Take over what the first block's attention shares with all blocks. Nothing by default."""

    def after_step(self, step: int, generator: torch.Generator, steps: int | None = None) -> None:
        """Called by the training loop after optimiser step ``step`` (from 1) of ``steps``. Nothing by default."""


A = TypeVar("A", bound=type[Attention])
_registry: dict[str, type[Attention]] = {}


def register(cls: A) -> A:
    """Class decorator: make the mechanism available under the name of its file."""
    _registry[cls.__module__.rsplit(".", 1)[-1]] = cls
    return cls


def registered(name: str) -> type[Attention]:
    """Return the class that ``name``'s file registered."""
    return _registry[name]
