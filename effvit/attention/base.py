"""The attention contract: what every mechanism shares, and what it must say for itself.

Shapes: B batch, N tokens (one class token, then gh*gw patches, row-major), C width, H heads, d = C / H.
"""

from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.errors import UserError
from effvit.kernels.linear import Linear, product, weight_gradient
from effvit.processor import is_amds

Grid = tuple[int, int]
_SHORT, _LONG = 128, 1024  # tokens
_COPIED_NUMBERS = 2**21  # 8 MiB of float32
_FLOAT32_PAYS = is_amds()


class AttentionOptions(BaseModel):
    """Options of one mechanism, with the rules that make them valid. Subclasses add the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def check_grid(self, grid_size: Grid) -> None:
        """Raise ``UserError`` where the options do not fit the patch grid. Nothing to check by default."""


class Attention(nn.Module):
    """Multi-head self-attention of which only the mixing of tokens varies.

    A mechanism implements ``attend`` and ``mixing_macs``. It must be linear in ``v`` for given ``q``, ``k`` and
    context, so that the N x N matrix it implies is ``attend(q, k, I)``: that is how ``return_map`` works for all.

    Dropout of attention probabilities acts on the factor that multiplies the values from the left, where a
    mechanism has no N x N matrix to drop from (each says which); it stays unbiased and linear in ``v``.
    """

    Options: ClassVar[type[AttentionOptions]] = AttentionOptions
    complexity: ClassVar[str]
    paper: ClassVar[str]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        options: AttentionOptions,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        options.check_grid(grid_size)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.grid_size = grid_size
        self.num_patches = grid_size[0] * grid_size[1]
        self.num_tokens = 1 + self.num_patches
        self.attn_drop = attn_drop
        self.build_maps(qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def build_maps(self, qkv_bias: bool) -> None:
        """Create the maps from tokens to queries, keys and values: one merged map, rows in the order q, k, v."""
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=qkv_bias)

    def forward(self, x: Tensor, return_map: bool = False) -> Any:
        """Mix the tokens of each sample.

        Args:
            x: tokens of shape ``(B, N, C)``.
            return_map: also return the implied attention matrix.

        Returns:
            Tokens ``(B, N, C)``; with ``return_map`` a pair of those and the matrix ``(B, H, N, N)``.
        """
        if x.shape[1:] != (self.num_tokens, self.dim):
            raise UserError(
                f"attention: got tokens of shape {tuple(x.shape)}, expected (batch, {self.num_tokens}, {self.dim}): "
                f"a class token and {self.grid_size[0]} x {self.grid_size[1]} patches of width {self.dim}"
            )
        q, k, v, *context = self.project(x)
        if not return_map:
            return self.merge(self.attend(q, k, v, *context))
        # One pass over [v, I], so that both parts see the same dropout mask.
        both = self.attend(q, k, torch.cat([v, self.map_values(v)], dim=-1), *context)
        y, attention_map = both.split([self.head_dim, self.num_tokens], dim=-1)
        return self.merge(y), attention_map

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens ``(B, N, C)`` to q, k, v ``(B, H, N, d)``; anything after them is passed on to ``attend``."""
        return self.split_maps(x, self.qkv.weight, self.qkv.bias)

    def split_maps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens to q, k, v by merged maps: ``weight`` ``(3C, C)`` and ``bias`` ``(3C,)``, rows in that order."""
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
            q, k, v = QKVMaps.apply(x, weight, bias)
        else:
            q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        """``(B, rows, C)`` to ``(B, H, rows, d)``, without a copy."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        """Mix values ``(B, H, N, e)`` of any width e into ``(B, H, N, e)``, linearly in ``v``."""
        raise NotImplementedError

    def map_values(self, v: Tensor) -> Tensor:
        """Values for which ``attend`` returns the implied matrix: the identity over tokens, ``(B, H, N, N)``."""
        eye = torch.eye(self.num_tokens, dtype=v.dtype, device=v.device)
        return eye.expand(*v.shape[:2], -1, -1)

    def merge(self, y: Tensor) -> Tensor:
        """Heads ``(B, H, N, d)`` to tokens ``(B, N, C)``, through the output projection."""
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    @property
    def dropout_p(self) -> float:
        """Probability with which attention is dropped right now: 0 in eval mode."""
        return self.attn_drop if self.training else 0.0

    def macs(self) -> int:
        """Multiply-adds of one forward pass for one sample, in closed form.

        Bias, softmax, exp, normalisation and pooling are not counted.
        """
        return self.map_macs() + self.mixing_macs()

    def map_macs(self) -> int:
        """MACs of the query, key, value and output maps: 4NC²."""
        return 4 * self.num_tokens * self.dim**2

    def mixing_macs(self) -> int:
        """MACs of everything between the maps."""
        raise NotImplementedError

    def reset_mechanism(self) -> None:
        """Set what the mechanism starts from, where a model's common initialisation must not touch it."""

    def share_with(self, first: "Attention") -> None:
        """Take over what the first block's attention shares with all blocks. Nothing by default."""

    def after_step(self, step: int, generator: torch.Generator) -> None:
        """Called by the training loop after optimiser step number ``step`` (from 1). Nothing by default."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d) v block by block, no matrix in memory: ``(B, H, N, d)`` and M keys to ``(B, H, N, e)``."""
    half = q.device.type == "cpu" and v.dtype in (torch.bfloat16, torch.float16)
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows, columns = q.shape[-2], k.shape[-2]
    if half and trained and max(rows, columns) <= _SHORT:
        # In half precision the CPU's backward pass over sequences this short takes up to four times as long.
        return _attention_in_float32(q, k, v, dropout_p)
    eager = not torch.compiler.is_compiling()
    if half and not trained and min(rows, columns) >= _LONG and eager and _FLOAT32_PAYS:
        # Over sequences this long AMD's processors (Zen 4, Zen 5) take 1.05 to 1.2 times as long in bfloat16, 1.8 to
        # 2.1 in float16. A few samples at a time: copies of all of them would be memory that is new at every call.
        at_once = max(1, _COPIED_NUMBERS // max(tensor.shape[1:].numel() for tensor in (q, k, v)))
        parts = zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True)
        return torch.cat([_attention_in_float32(*part, dropout_p).transpose(1, 2) for part in parts]).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


def _attention_in_float32(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout_p).to(v.dtype)


class QKVMaps(torch.autograd.Function):
    """The merged map x Wᵀ + b as three results, each whole in memory: nothing of 3C columns is written, cut or glued.

    An accelerator is better off with one product, of which the parts are views; a CPU pays for each pass over tokens.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(product(x, w, b) for w, b in zip(weight.chunk(3), biases, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        w_q, w_k, w_v = weight.chunk(3)
        q, k, v = gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = product(q, w_q.T) + product(k, w_k.T) + product(v, w_v.T) if needs_x else None
        d_weight = torch.cat([weight_gradient(g, x) for g in gradients]) if needs_weight else None
        d_bias = torch.cat([g.flatten(0, -2).sum(0) for g in gradients]) if needs_bias else None
        return d_x, d_weight, d_bias


A = TypeVar("A", bound=type[Attention])
_registry: dict[str, type[Attention]] = {}


def register(cls: A) -> A:
    """Class decorator: make the mechanism available under the name of its file."""
    _registry[cls.__module__.rsplit(".", 1)[-1]] = cls
    return cls


def registered(name: str) -> type[Attention]:
    """Return the class that ``name``'s file registered."""
    return _registry[name]
