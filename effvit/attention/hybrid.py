"""Hybrid: dilated windows for detail, linear attention for context, a gate per token.

effvit's own, inspired by ACC-ViT's atrous windows and gated fusion (Ibtehaz et al. 2024, arXiv 2403.04200,
2406.08859) and by linear attention (Katharopoulos et al. 2020, arXiv 2006.16236).
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.errors import UserError
from effvit.kernels.choice import primitive
from effvit.kernels.feature_attention import Features, feature_attention
from effvit.kernels.softmax_attention import softmax_attention
from effvit.kernels.window_attention import Windows, window_attention

_EPS = 1e-6  # exp underflows far below 0, and the normaliser with it
Branch = Literal["regional", "dilated", "linear"]


@primitive  # or who looks for attention in a graph (timm's AttentionExtract) takes its softmax for it
def _shares(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _distinct(values: list[Any]) -> list[Any]:
    if not values or len(set(values)) != len(values):
        raise ValueError("must name at least one, each once")
    return values


class HybridOptions(AttentionOptions):
    """w x w windows at each of ``dilations``; ``branches`` picks regional (dilation 1), dilated (the rest), linear."""

    window_size: int = Field(4, ge=1)
    dilations: Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_distinct)] = Field([1, 2])
    branches: Annotated[list[Branch], AfterValidator(_distinct)] = Field(["regional", "dilated", "linear"])

    @model_validator(mode="after")
    def _branches_have_dilations(self) -> "HybridOptions":
        if "regional" in self.branches and 1 not in self.dilations:
            raise ValueError("branches: 'regional' needs dilation 1 among dilations")
        if "dilated" in self.branches and max(self.dilations) == 1:
            raise ValueError("branches: 'dilated' needs a dilation above 1 among dilations")
        return self

    def check_grid(self, grid_size: Grid, prefix_tokens: int = 1) -> None:
        grid = f"{max(grid_size)}, the longer side of the grid of {grid_size[0]} x {grid_size[1]} patches"
        for name, largest in (("window_size", self.window_size), ("dilations", max(self.dilations))):
            if largest > max(grid_size):
                raise UserError(f"attention.hybrid.{name}={getattr(self, name)}: must be at most {grid}")

    def used_dilations(self) -> list[int]:
        """Return the dilations that the selected branches use, one windowed branch each."""
        return [r for r in self.dilations if ("regional" if r == 1 else "dilated") in self.branches]


@register
class HybridAttention(Attention):
    """Σ_branch g_branch(x) · branch(q, k, v) for patches; exact attention for prefix tokens.

    One q, k, v serves all branches. In the branch of dilation r a patch attends to the patches of its window (same
    row and column modulo r, w x w of them) and to the prefix tokens; in the linear branch to all tokens, with
    φ = elu + 1 + ε. Prefix tokens attend to all tokens by softmax. Dropout acts on the softmaxes and on φ(q).
    """

    Options = HybridOptions
    complexity = "O(N (w² |dilations| + d))"
    paper = "effvit; inspired by arXiv 2403.04200 and 2006.16236"
    needs_grid = True

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: HybridOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.windows = [Windows(*grid_size, options.window_size, r) for r in options.used_dilations()]
        self.linear = "linear" in options.branches
        self.branch_names = [f"window r={each.dilation}" for each in self.windows] + ["linear"] * self.linear
        self.gate = nn.Linear(dim, len(self.branch_names)) if len(self.branch_names) > 1 else None
        self.reset_mechanism()

    def reset_mechanism(self) -> None:
        for parameter in self.gate.parameters() if self.gate is not None else ():
            nn.init.zeros_(parameter)  # equal shares at the start

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().project(x) if self.gate is None else (*super().project(x), self.gate_shares(x))

    def gate_shares(self, x: Tensor) -> Tensor:
        """Share of each branch in each patch's output: tokens ``(B, N, C)`` to ``(B, P, branches)``, summing to 1."""
        assert self.gate is not None, "a single branch has no gate"
        return _shares(self.gate(x[:, self.prefix_tokens :]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        s = self.prefix_tokens
        branches = [window_attention(q[:, :, s:], k, v, each, self.dropout_p) for each in self.windows]
        if self.linear:
            branches.append(feature_attention(q[:, :, s:], k, v, Features("elu", _EPS), self.dropout_p))
        patches = branches[0]
        if self.gate is not None:
            shares = context[0].to(v.dtype)[:, None, ..., None]  # (B, 1, P, branches, 1)
            patches = shares[:, :, :, 0] * branches[0]
            for number, branch in enumerate(branches[1:], 1):
                patches = torch.addcmul(patches, shares[:, :, :, number], branch)
        if not s:
            return patches
        prefix = softmax_attention(q[:, :, :s], k, v, self.dropout_p)
        return torch.cat([prefix.transpose(1, 2), patches.transpose(1, 2)], dim=1).transpose(1, 2)

    def mixing_macs(self) -> int:
        """2SNC for prefix tokens; per dilation 2P'C(w² + S) with P' patches of the padded grid, P where windows tile.

        Linear branch: NCd + PCd + PC. Gate over R > 1 branches: PCR.
        """
        n, p, c, d = self.num_tokens, self.num_patches, self.dim, self.head_dim
        total = 2 * self.prefix_tokens * n * c
        for windows in self.windows:
            rows, columns = windows.padded
            total += 2 * rows * columns * c * (windows.size**2 + self.prefix_tokens)
        if self.linear:
            total += n * c * d + p * c * d + p * c
        if self.gate is not None:
            total += p * c * len(self.branch_names)
        return total
