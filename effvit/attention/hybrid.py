"""Hybrid: dilated windows for detail and linear attention for context, each in heads of its own.

effvit's own, inspired by ACC-ViT's atrous windows and gated fusion (Ibtehaz et al. 2024, arXiv 2403.04200, 2406.08859)
and by linear attention (Katharopoulos et al. 2020, arXiv 2006.16236; Han et al. 2023, arXiv 2308.00442).
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from effvit.attention.base import DISTINCT, Attention, AttentionOptions, Grid, register
from effvit.errors import UserError
from effvit.kernels.dispatch import feature_attention, window_attention
from effvit.kernels.feature_attention import Features
from effvit.kernels.prefix_and_patches import prefix_and_patches
from effvit.kernels.shares import shares, weighted_sum
from effvit.kernels.window_attention import Windows

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
        for name, which, has in (("regional", 1, 1 in self.dilations), ("dilated", "above 1", max(self.dilations) > 1)):
            if name in self.branches and not has:
                raise ValueError(f"branches: {name!r} needs dilation {which} among dilations")
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
        gated, g, side = options.fusion == "gate", options.global_every, max(grid_size)
        names = [name for name in options.branches if not g or (name == "linear") == ((self.layer + 1) % g == 0)]
        used = [r for r in options.dilations if ("regional" if r == 1 else "dilated") in names]
        # No larger than what there is of each phase: windows that hang over the grid cost as if they were whole.
        windows = [Windows(*grid_size, min(options.window_size, -(-side // r)), r) for r in used]
        self.branches: list[Windows | None] = [*windows, *([None] if "linear" in names else [])]  # None: linear
        self.branch_names = ["linear" if w is None else f"window r={w.dilation}" for w in self.branches]
        r = len(self.branches)
        self.branch_of_heads = sorted((self.layer * num_heads + head) % r for head in range(num_heads))
        self.heads_of_branches = [num_heads if gated else self.branch_of_heads.count(branch) for branch in range(r)]
        self.gate = nn.Linear(dim, r) if gated and r > 1 else None
        focused = options.feature_map == "focused" and "linear" in names
        self.scale = nn.Parameter(torch.zeros(self.head_dim * self.heads_of_branches[-1])) if focused else None
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
        p, heads, tokens = self.dropout_p, self.num_heads, (self.prefix_tokens, self.num_patches)

        def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = (window_attention(q, k, v, [w] * heads, p) if w else self.linear(q, k, v) for w in self.branches)
            return weighted_sum(outputs, *context)

        windows = [None if context else self.branches[branch] for branch in self.branch_of_heads]
        return prefix_and_patches(q, k, v, tokens, windows, p, mixed if context else self.linear)

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Patches' queries ``(B, h, P, d)`` through the linear branch in its h heads."""
        features = Features(self.options.feature_map, eps=1e-6)  # far below 0, elu's exp underflows as relu does
        if self.scale is not None:
            scale = nn.functional.softplus(self.scale).unflatten(0, (-1, 1, self.head_dim))
            features = Features("focused", 0.0, None, scale, power=3.0)  # as published
        return feature_attention(q, k, v, features, self.dropout_p)

    def mixing_macs(self) -> int:
        """2SNC; a head 2P'd(w² + S) with P' patches of the padded grid, or Nd² + Pd² + Pd; a gate of R branches PCR."""
        n, p, d, s = self.num_tokens, self.num_patches, self.head_dim, self.prefix_tokens
        linear, total = n * d**2 + p * d**2 + p * d, 2 * s * n * self.dim
        for heads, w in zip(self.heads_of_branches, self.branches, strict=True):
            total += heads * (2 * w.area * d * (w.size**2 + s) if w else linear)
        return total if self.gate is None else total + p * self.dim * len(self.branch_names)
