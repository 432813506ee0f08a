"""Hybrid: dilated windows for detail and linear attention for context, each in heads of its own.

effvit's own, inspired by ACC-ViT's atrous windows and gated fusion (Ibtehaz et al. 2024, arXiv 2403.04200, 2406.08859)
and by linear attention (Katharopoulos et al. 2020, arXiv 2006.16236; Han et al. 2023, arXiv 2308.00442).
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import DISTINCT, Attention, AttentionOptions, Grid, register
from effvit.errors import UserError
from effvit.kernels.feature_attention import Features, feature_attention
from effvit.kernels.prefix_and_patches import prefix_and_patches
from effvit.kernels.shares import shares, weighted_sum
from effvit.kernels.window_attention import Windows, window_attention

_POWER = 3.0  # of focused features, as published
_Branch = Literal["regional", "dilated", "linear"]


class HybridOptions(AttentionOptions):
    """``branches``: regional (windows of dilation 1), dilated (the rest), linear; ``fusion``: heads, or a gate.

    ``feature_map``: φ. ``global_every`` g: every g-th block has the linear branch alone, the rest the others; 0: all.
    """

    window_size: int = Field(4, ge=1)
    dilations: Annotated[list[Annotated[int, Field(ge=1)]], DISTINCT] = Field([1, 2])
    branches: Annotated[list[_Branch], DISTINCT] = Field(["regional", "dilated", "linear"])
    fusion: Literal["heads", "gate"] = "heads"
    feature_map: Literal["elu", "relu", "focused"] = "elu"
    global_every: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _branches_have_what_they_need(self) -> "HybridOptions":
        if "regional" in self.branches and 1 not in self.dilations:
            raise ValueError("branches: 'regional' needs dilation 1 among dilations")
        if "dilated" in self.branches and max(self.dilations) == 1:
            raise ValueError("branches: 'dilated' needs a dilation above 1 among dilations")
        if self.global_every and ("linear" not in self.branches or len(self.branches) == 1):
            raise ValueError("global_every: needs 'linear' and another one among branches")
        return self

    def check_grid(self, grid_size: Grid, prefix_tokens: int = 1) -> None:
        side, grid = max(grid_size), f"the longer side of the grid of {grid_size[0]} x {grid_size[1]} patches"
        for name, largest in (("window_size", self.window_size), ("dilations", max(self.dilations))):
            if largest > side:
                raise UserError(f"attention.hybrid.{name}={getattr(self, name)}: must be at most {side}, {grid}")


@register
class HybridAttention(Attention):
    """Patches: softmax over windows in some heads, φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) in others; prefix tokens: exact.

    In a window of dilation r a patch attends to w x w patches (same row and column modulo r) and to the prefix tokens;
    in the linear branch to all tokens. Heads are dealt in turns, continued from block to block. With ``fusion: gate``
    it is Σ_branch g_branch(x) · branch(q, k, v) in every head. Dropout acts on softmaxes and φ(q).
    """

    Options = HybridOptions
    complexity = "O(N (w² + d))"
    paper = "effvit; inspired by arXiv 2403.04200 and 2006.16236"
    needs_grid = True
    options: HybridOptions

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: HybridOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        gated, g, number, side = options.fusion == "gate", options.global_every, self.layer + 1, max(grid_size)
        branches = [name for name in options.branches if not g or (name == "linear") == (number % g == 0)]
        used = [r for r in options.dilations if ("regional" if r == 1 else "dilated") in branches]
        # No larger than what there is of each phase: windows that hang over the grid cost as if they were whole.
        self.windows = [Windows(*grid_size, min(options.window_size, -(-side // r)), r) for r in used]
        self.branch_names = [*(f"window r={r}" for r in used), *(["linear"] if "linear" in branches else [])]
        r = len(self.branch_names)
        self.branch_of_heads = sorted((self.layer * num_heads + head) % r for head in range(num_heads))
        self.heads_of_branches = [num_heads if gated else self.branch_of_heads.count(branch) for branch in range(r)]
        self.gate = nn.Linear(dim, r) if gated and r > 1 else None
        focused = self.head_dim * self.heads_of_branches[-1] if options.feature_map == "focused" else 0
        self.scale = nn.Parameter(torch.zeros(focused)) if focused and "linear" in branches else None
        self.reset_mechanism()

    def reset_mechanism(self) -> None:
        for parameter in self.gate.parameters() if self.gate is not None else ():
            nn.init.zeros_(parameter)  # equal shares at the start

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().project(x) if self.gate is None else (*super().project(x), self.gate_shares(x))

    def gate_shares(self, x: Tensor) -> Tensor:
        """Share of each branch in each patch's output: tokens ``(B, N, C)`` to ``(B, P, branches)``, summing to 1."""
        assert self.gate is not None, "no gate"
        return shares(self.gate(x[:, self.prefix_tokens :]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        tokens = self.prefix_tokens, self.num_patches
        if context:
            mix = lambda *qkv: weighted_sum(self.branches(*qkv), context[0])  # noqa: E731
            return prefix_and_patches(q, k, v, tokens, [None] * self.num_heads, self.dropout_p, mix)
        windows = [[*self.windows, None][branch] for branch in self.branch_of_heads]
        return prefix_and_patches(q, k, v, tokens, windows, self.dropout_p, self.linear)

    def branches(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        """Patches' queries ``(B, H, P, d)`` and all keys and values through one branch after the other."""
        for windows in self.windows:
            yield window_attention(q, k, v, [windows] * self.num_heads, self.dropout_p)
        if "linear" in self.branch_names:
            yield self.linear(q, k, v)

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Patches' queries ``(B, h, P, d)`` through the linear branch in its h heads."""
        features = Features(self.options.feature_map, eps=1e-6)  # elu's exp underflows far below 0
        if self.scale is not None:
            scale = F.softplus(self.scale).unflatten(0, (-1, 1, self.head_dim))
            features = Features("focused", 0.0, None, scale, _POWER)
        return feature_attention(q, k, v, features, self.dropout_p)

    def mixing_macs(self) -> int:
        """2SNC; a head 2P'd(w² + S) with P' patches of the padded grid, or Nd² + Pd² + Pd; a gate of R branches PCR."""
        n, p, d, s = self.num_tokens, self.num_patches, self.head_dim, self.prefix_tokens
        total = 2 * s * n * self.dim
        for heads, windows in zip(self.heads_of_branches, self.windows, strict=False):
            total += heads * 2 * windows.area * d * (windows.size**2 + s)
        if "linear" in self.branch_names:
            total += self.heads_of_branches[-1] * (n * d**2 + p * d**2 + p * d)
        return total if self.gate is None else total + p * self.dim * len(self.branch_names)
