"""Public modules of the same mechanisms, built with the hyperparameters of a module of ours.

Where no package has one, a plain transcription of the published formula, ours and said to be: ``PLAIN``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention import Attention

PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with ours, both without QKV bias.

    ``package`` it is from; ``build`` makes it like a module of ours; ``options`` are those at which both are the same;
    ``prefix_tokens`` is 0 where it knows patches alone.
    """

    package: str
    build: Callable[[Any], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    prefix_tokens: int = 1


def _timm(fused: bool) -> Callable[[Attention], nn.Module]:
    def build(ours: Attention) -> nn.Module:
        from timm.layers.attention import Attention as TimmAttention

        module = TimmAttention(ours.dim, ours.num_heads, qkv_bias=False)
        setattr(module, "fused_attn", fused)  # noqa: B010 - declared final, for TorchScript's sake
        return module

    return build


def _linformer(ours: Any) -> nn.Module:
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(ours.dim, ours.num_tokens, k=ours.k, heads=ours.num_heads)


def _performer(ours: Any) -> nn.Module:
    from performer_pytorch import SelfAttention

    return SelfAttention(
        ours.dim, heads=ours.num_heads, dim_head=ours.head_dim, nb_features=ours.num_features, qkv_bias=False
    )


def _nystromformer(ours: Any) -> nn.Module:
    from nystrom_attention import NystromAttention

    return NystromAttention(
        ours.dim,
        dim_head=ours.head_dim,
        heads=ours.num_heads,
        num_landmarks=ours.num_landmarks,
        pinv_iterations=ours.pinv_iterations,
        residual_conv_kernel=ours.conv.kernel_size[0],
    )


def _linear(ours: Attention) -> nn.Module:
    from performer_pytorch import SelfAttention

    return SelfAttention(ours.dim, heads=ours.num_heads, dim_head=ours.head_dim, no_projection=True, qkv_bias=False)


class _OnGrid(nn.Module):
    """A timm module that takes the grid as an argument."""

    def __init__(self, module: nn.Module, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.module, self.grid_size = module, grid_size

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, list(self.grid_size))


def _pooled(ours: Any) -> nn.Module:
    """PVTv2's linear attention without the convolution, norm and GELU between pooling and maps."""
    from timm.models.pvt_v2 import Attention as PVTAttention

    module: Any = PVTAttention(ours.dim, ours.num_heads, linear_attn=True, qkv_bias=False)
    module.pool = nn.AdaptiveAvgPool2d(ours.cells)
    module.sr = module.norm = module.act = nn.Identity()
    return _OnGrid(module, ours.grid_size)


class _InWindows(nn.Module):
    """timm's Swin attention in the windows of a grid, padded as its block does."""

    def __init__(self, module: nn.Module, grid_size: tuple[int, int], window_size: int) -> None:
        super().__init__()
        self.module, self.grid_size, self.window_size = module, grid_size, window_size

    def forward(self, x: Tensor) -> Tensor:
        from timm.models.swin_transformer import window_partition, window_reverse

        (rows, columns), w = self.grid_size, self.window_size
        below, right = -rows % w, -columns % w
        grid = F.pad(x.unflatten(1, self.grid_size), (0, 0, 0, right, 0, below))
        windows = self.module(window_partition(grid, (w, w)).flatten(1, 2)).unflatten(1, (w, w))
        whole = window_reverse(windows, (w, w), rows + below, columns + right)
        return whole[:, :rows, :columns].flatten(1, 2)


def _window(ours: Any) -> nn.Module:
    """Swin's window attention without its relative position bias."""
    from timm.models.swin_transformer import WindowAttention

    module: Any = WindowAttention(ours.dim, ours.num_heads, window_size=ours.windows.size, qkv_bias=False)
    del module.relative_position_bias_table
    module._get_rel_pos_bias = lambda: 0.0
    return _InWindows(module, ours.grid_size, ours.windows.size)


class _Plain(nn.Module):
    """Maps around a formula of q, k, v ``(B, H, N, d)``."""

    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.num_heads = ours.num_heads
        self.qkv, self.proj = nn.Linear(ours.dim, 3 * ours.dim, bias=False), nn.Linear(ours.dim, ours.dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(*qkv.unbind(0)).transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class _PlainAgent(_Plain):
    """softmax(q aᵀ / √d) softmax(a kᵀ / √d) v."""

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        self.grid_size, self.cells = ours.grid_size, ours.cells

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = q[:, :, q.shape[2] - self.grid_size[0] * self.grid_size[1] :].flatten(0, 1).transpose(1, 2)
        pooled = F.adaptive_avg_pool2d(grid.unflatten(2, self.grid_size), self.cells)
        agents, scale = pooled.flatten(2).transpose(1, 2).unflatten(0, q.shape[:2]), q.shape[-1] ** -0.5
        gathered = (agents * scale @ k.mT).softmax(dim=-1) @ v
        return (q * scale @ agents.mT).softmax(dim=-1) @ gathered


class _PlainFocused(_Plain):
    """φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)) with φ(x) = ‖x̂‖ x̂ᵖ / ‖x̂ᵖ‖."""

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        self.power, self.scale = ours.options.power, nn.Parameter(torch.zeros(ours.num_heads, 1, ours.head_dim))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = ((tokens.relu() + 1e-6) / F.softplus(self.scale) for tokens in (q, k))
        q, k = (self.turned(tokens) for tokens in (q, k))
        return q @ (k.mT @ v) / (q @ k.sum(dim=-2).unsqueeze(-1))

    def turned(self, tokens: Tensor) -> Tensor:
        powers = tokens**self.power
        return powers / powers.norm(dim=-1, keepdim=True) * tokens.norm(dim=-1, keepdim=True)


PEERS = {
    "standard": Peer("timm", _timm(fused=False)),
    "fused": Peer("timm", _timm(fused=True)),
    "linformer": Peer("linformer", _linformer),
    "performer": Peer("performer-pytorch", _performer),
    "nystromformer": Peer("nystrom-attention", _nystromformer),
    "linear": Peer("performer-pytorch", _linear, {"feature_map": "softmax"}),
    "pooled": Peer("timm", _pooled, prefix_tokens=0),
    "window": Peer("timm", _window, prefix_tokens=0),
    "agent": Peer(PLAIN, _PlainAgent),
    "focused": Peer(PLAIN, _PlainFocused),
}
