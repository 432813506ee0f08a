"""Hybrid: dilated windows for detail, linear attention for context, a gate per token.

effvit's own, inspired by ACC-ViT's atrous windows and gated fusion (Ibtehaz et al. 2024, arXiv 2403.04200,
2406.08859) and by linear attention (Katharopoulos et al. 2020, arXiv 2006.16236).
"""

from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.errors import UserError

_EPS = 1e-6  # exp underflows far below 0, and the normaliser with it
Branch = Literal["regional", "dilated", "linear"]


class HybridOptions(AttentionOptions):
    """w x w windows at each of ``dilations``; ``branches`` picks regional (dilation 1), dilated (the rest), linear."""

    window_size: int = Field(4, ge=1)
    dilations: list[int] = Field([1, 2])
    branches: list[Branch] = Field(["regional", "dilated", "linear"])

    @field_validator("dilations", "branches")
    @classmethod
    def _distinct(cls, values: list[Any]) -> list[Any]:
        if not values or len(set(values)) != len(values):
            raise ValueError("must name at least one, each once")
        return values

    @field_validator("dilations")
    @classmethod
    def _positive(cls, dilations: list[int]) -> list[int]:
        if min(dilations) < 1:
            raise ValueError("each must be at least 1")
        return dilations

    @model_validator(mode="after")
    def _branches_have_dilations(self) -> "HybridOptions":
        if "regional" in self.branches and 1 not in self.dilations:
            raise ValueError("branches: 'regional' needs dilation 1 among dilations")
        if "dilated" in self.branches and max(self.dilations) == 1:
            raise ValueError("branches: 'dilated' needs a dilation above 1 among dilations")
        return self

    def check_grid(self, grid_size: Grid) -> None:
        rows, columns = grid_size
        if max(self.window_size, *self.dilations) > max(grid_size):
            name = "window_size" if self.window_size > max(grid_size) else "dilations"
            raise UserError(
                f"attention.hybrid.{name}={getattr(self, name)}: must be at most {max(grid_size)}, "
                f"the longer side of the grid of {rows} x {columns} patches"
            )

    def used_dilations(self) -> list[int]:
        """Return the dilations that the selected branches use, one windowed branch each."""
        return [r for r in self.dilations if ("regional" if r == 1 else "dilated") in self.branches]


@register
class HybridAttention(Attention):
    """Σ_branch g_branch(x) · branch(q, k, v) for patches; exact attention for the class token.

    One q, k, v serves all branches. In the branch of dilation r a patch attends to the patches of its window (same
    row and column modulo r, w x w of them) and to the class token; in the linear branch to all tokens, with
    φ = elu + 1 + ε. The class token attends to all tokens by softmax. Dropout acts on the softmaxes and on φ(q).
    """

    Options = HybridOptions
    complexity = "O(N (w² |dilations| + d))"
    paper = "effvit; inspired by arXiv 2403.04200 and 2006.16236"

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: HybridOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.window_size = options.window_size
        self.dilations = options.used_dilations()
        self.linear = "linear" in options.branches
        self.branch_names = [f"window r={r}" for r in self.dilations] + ["linear"] * self.linear
        self.gate = nn.Linear(dim, len(self.branch_names)) if len(self.branch_names) > 1 else None
        self.reset_mechanism()
        for r in self.dilations:
            members = window_members(grid_size, self.window_size, r)
            slots = torch.empty(self.num_patches, dtype=torch.long)
            slots[members[members >= 0]] = torch.nonzero(members.flatten() >= 0).squeeze(1)
            # Derived from the grid, hence not in the state dict.
            self.register_buffer(f"members_{r}", members, persistent=False)
            self.register_buffer(f"slots_{r}", slots, persistent=False)

    def reset_mechanism(self) -> None:
        if self.gate is not None:  # equal shares at the start
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.gate is None:
            return super().project(x)
        return *super().project(x), self.gate_shares(x)

    def gate_shares(self, x: Tensor) -> Tensor:
        """Share of each branch in each patch's output: tokens ``(B, N, C)`` to ``(B, P, branches)``, summing to 1."""
        assert self.gate is not None, "a single branch has no gate"
        return self.gate(x[:, 1:]).softmax(dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        dtype, device = v.dtype, q.device.type
        on_cpu = device == "cpu"
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not on_cpu):
            if on_cpu:  # half precision takes four times as long backward on windows this small
                q, k, v = (tokens.to(torch.promote_types(dtype, torch.float32)) for tokens in (q, k, v))
            branches = [self.window_branch(q, k, v, r) for r in self.dilations]
            if self.linear:
                branches.append(self.linear_branch(q, k, v))
            if self.gate is None:
                patches = branches[0]
            else:
                shares = context[0].to(v.dtype)[:, None].unbind(dim=-1)  # one (B, 1, P) a branch
                patches = torch.stack([g[..., None] * y for g, y in zip(shares, branches, strict=True)]).sum(dim=0)
            class_token = F.scaled_dot_product_attention(q[:, :, :1], k, v, dropout_p=self.dropout_p)
            return torch.cat([class_token, patches], dim=2).to(dtype)

    def window_branch(self, q: Tensor, k: Tensor, v: Tensor, r: int) -> Tensor:
        """Softmax attention of each patch in its window: ``(B, H, P, e)``."""
        members, slots = self.get_buffer(f"members_{r}"), self.get_buffer(f"slots_{r}")  # (windows, w²), (P,)
        windows, size = members.shape
        token = members.clamp(min=0) + 1  # where a window hangs over the grid, any token: it is masked
        with_class = torch.cat([token.new_zeros(windows, 1), token], dim=1)  # (windows, 1 + w²)
        mask = None
        if windows * size != self.num_patches:
            mask = torch.cat([members.new_zeros(windows, 1), members], dim=1)[None, :, None] >= 0
        b = q.shape[0]
        q, k, v = (tokens.flatten(0, 1) for tokens in (q, k, v))  # windows take the place of heads
        y = F.scaled_dot_product_attention(
            q[:, token], k[:, with_class], v[:, with_class], attn_mask=mask, dropout_p=self.dropout_p
        )  # (B H, windows, w², e)
        return y.flatten(1, 2)[:, slots].unflatten(0, (b, self.num_heads))

    def linear_branch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) for the patches: ``(B, H, P, e)``."""
        with torch.autocast(q.device.type, enabled=False):  # sums over all tokens overflow float16
            dtype = torch.promote_types(q.dtype, torch.float32)
            phi_q, phi_k = elu_features(q[:, :, 1:].to(dtype)), elu_features(k.to(dtype))
            phi_q = phi_q / (phi_q @ phi_k.sum(dim=-2).unsqueeze(-1))
            y = F.dropout(phi_q, self.dropout_p) @ (phi_k.transpose(-2, -1) @ v.to(dtype))
        return y.to(v.dtype)

    def mixing_macs(self) -> int:
        """2NC for the class token; per dilation 2SC(w² + 1) with S window slots (P where windows tile the grid).

        Linear branch: NCd + PCd + PC. Gate over R > 1 branches: PCR.
        """
        n, p, c, d = self.num_tokens, self.num_patches, self.dim, self.head_dim
        total = 2 * n * c
        for r in self.dilations:
            members = self.get_buffer(f"members_{r}")
            total += 2 * members.numel() * c * (members.shape[1] + 1)
        if self.linear:
            total += n * c * d + p * c * d + p * c
        if self.gate is not None:
            total += p * c * len(self.branch_names)
        return total


def elu_features(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 + ε."""
    # elu + 1 is exp(x) below 0 and x + 1 above. Adding 1 to elu's -1 + exp(x) would round exp(x) away.
    return x.clamp(max=0).exp() + (x.relu() + _EPS)


def window_members(grid_size: Grid, window_size: int, dilation: int) -> Tensor:
    """Patches of each window: ``(windows, w²)`` row-major patch numbers, -1 where a window hangs over the grid.

    The grid is split into r x r phases (rows and columns modulo r), each phase into w x w windows.
    """
    rows, columns = grid_size
    span = window_size * dilation
    padded_rows, padded_columns = (-(-side // span) * span for side in grid_size)
    patch = torch.full((padded_rows, padded_columns), -1)
    patch[:rows, :columns] = torch.arange(rows * columns).view(rows, columns)
    windows = patch.view(padded_rows // span, window_size, dilation, padded_columns // span, window_size, dilation)
    members = windows.permute(0, 2, 3, 5, 1, 4).reshape(-1, window_size**2)
    return members[(members >= 0).any(dim=1)]  # a phase's last window can lie wholly outside
