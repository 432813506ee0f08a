"""How near a mechanism comes to exact attention for the same q, k, v, against what it costs.

Shapes: B images, H heads, N tokens, d = width of a head. What a mechanism would learn else is set by rule:
Linformer's E = F are means over k groups of tokens (`pooling`), Nyströmformer has no convolution, the hybrid's gate
gives equal shares, and the scale of focused attention is one for all channels, as where training starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention import BASELINE, Attention, build_attention, check_options
from effvit.attention.base import Grid
from effvit.attention.hybrid import HybridAttention
from effvit.attention.linformer import LinformerAttention
from effvit.attention.pooled import PooledAttention
from effvit.evaluation.probe import recorded
from effvit.kernels.token_means import block_order
from effvit.model.pretrained import start_from
from effvit.model.vit import ViT, ViTConfig

DRAWS = 5  # of Performer's features
QKV = tuple[Tensor, Tensor, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The option that trades exactness for cost, the smallest value tried and, for a grid of patches, the largest."""

    option: str
    least: int
    most: Callable[[Grid], int]

    def values(self, grid: Grid) -> set[int]:
        """Powers of two from ``least`` on, and ``most``."""
        most = self.most(grid)
        return {2**i for i in range(most.bit_length()) if self.least <= 2**i} | {most}


def _tokens(grid: Grid) -> int:
    return 1 + grid[0] * grid[1]


_SIZES = {
    "linformer": Size("k", 4, _tokens),
    "performer": Size("num_features", 4, lambda grid: min(1024, 4 * (_tokens(grid) - 1))),
    "nystromformer": Size("num_landmarks", 4, _tokens),
    "hybrid": Size("window_size", 1, max),
    "agent": Size("agent_size", 1, max),
    "pooled": Size("pool_size", 1, max),
    "window": Size("window_size", 1, max),
}
_UNTRAINED = {"nystromformer": {"conv_kernel_size": 0}}


@dataclass(frozen=True)
class Variant:
    """A mechanism at one value of its size, which is empty where it has none."""

    attention: str
    options: dict[str, Any]
    option: str = ""
    value: int | None = None

    @property
    def draws(self) -> int:
        """How often it is built, with other random features each time."""
        return DRAWS if self.attention == "performer" else 1

    def build(self, dim: int, num_heads: int, grid: Grid, draw: int, layer: int = 0, depth: int = 1) -> Attention:
        """Build its module for a block, in eval mode, with what is learned set by rule."""
        torch.manual_seed(draw)  # the same features whatever was built before
        module = build_attention(self.attention, dim, num_heads, grid, layer=layer, depth=depth, **self.options).eval()
        set_untrained(module)
        return module


def variants(attention: str, options: dict[str, Any], grid: Grid) -> list[Variant]:
    """The mechanism at all sizes that are tried, that of ``options`` among them, from small to large."""
    options = check_options(attention, options, grid).model_dump() | _UNTRAINED.get(attention, {})
    size = _SIZES.get(attention)
    if size is None:
        return [Variant(attention, options)]
    values = sorted(size.values(grid) | {options[size.option]})
    return [Variant(attention, options | {size.option: value}, size.option, value) for value in values]


def pooling(rows: int, grid: Grid, prefix_tokens: int = 1) -> Tensor:
    """Means over compact groups of tokens whose sizes differ by one at most, ``(rows, N)``; a permutation if rows = N.

    Wang et al. (arXiv 2006.04768, section 4, "General projections") name pooling as well as learned projections. Groups
    are runs of the prefix tokens and then the patches in Nyströmformer's block order: docs/analysis.md has what other
    orders and a fit to data give.
    """
    tokens = prefix_tokens + grid[0] * grid[1]
    order = torch.cat([torch.arange(prefix_tokens), prefix_tokens + block_order(grid, rows)])
    group = torch.empty(tokens, dtype=torch.long)
    group[order] = torch.arange(tokens) * rows // tokens
    members = F.one_hot(group, rows).T.float()
    return members / members.sum(dim=1, keepdim=True)


def set_untrained(model: nn.Module) -> None:
    """Set all of Linformer's E and F in a model to `pooling`; what other mechanisms learn starts as it is measured."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LinformerAttention):
                for projection in (module.E, module.F):
                    projection.copy_(pooling(module.k, module.grid_size, module.prefix_tokens))


def mix(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the mechanism makes of q, k, v ``(B, H, N, d)``, before the output projection: the same shape."""
    context: list[Tensor] = []
    if isinstance(attention, LinformerAttention):
        # E (x W + b) = (E x) W + b for rows of E that sum to one, so projecting keys is projecting tokens.
        k, v = attention.E @ k, attention.F @ v
    elif isinstance(attention, PooledAttention):
        k, v = (attention.split_heads(attention.pool(rows.transpose(1, 2).flatten(2))) for rows in (k, v))
    elif isinstance(attention, HybridAttention) and attention.gate is not None:
        context = [attention.gate_shares(q.new_zeros(len(q), attention.num_tokens, attention.dim))]
    return attention.attend(q, k, v, *context)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖Y - Y*‖ / ‖Y*‖ (Frobenius) of each image and head ``(B, H, N, d)``; their mean."""
    return ((actual - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)).mean().item()


@torch.inference_mode()
def compare(variant: Variant, layers: Sequence[QKV], grid: Grid) -> list[Row]:
    """Error of one variant to exact attention, a row for each of the layers' q, k, v.

    Returns:
        ``option, value, layer`` (its place in ``layers``, from 1), ``error``, its 95 % interval ``error_low,
        error_high`` over draws of features (NaN where nothing is drawn), and the exact multiply-adds of an image's
        mixing, ``mixing_macs`` and ``fused_macs``.
    """
    q = layers[0][0]
    num_heads, dim = q.shape[1], q.shape[1] * q.shape[3]
    fused_macs = build_attention(BASELINE, dim, num_heads, grid).mixing_macs()
    rows = []
    for layer, (q, k, v) in enumerate(layers, 1):
        place = layer - 1, len(layers)
        modules = [variant.build(dim, num_heads, grid, draw, *place).to(q.device) for draw in range(variant.draws)]
        macs = {"mixing_macs": modules[0].mixing_macs(), "fused_macs": fused_macs}
        exact = F.scaled_dot_product_attention(q, k, v)
        errors = [relative_error(mix(module, q, k, v), exact) for module in modules]
        low, high = _interval(errors)
        key = {"option": variant.option, "value": variant.value, "layer": layer}
        rows.append(key | {"error": fmean(errors), "error_low": low, "error_high": high} | macs)
    return rows


def random_qkv(samples: int, num_heads: int, tokens: int, head_dim: int) -> QKV:
    """Independent standard normal q, k, v ``(samples, H, N, d)``: logits q·k/√d have a standard deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, samples, num_heads, tokens, head_dim, generator=generator)
    return q, k, v


@torch.inference_mode()
def trained_qkv(model: ViT, images: Tensor) -> list[QKV]:
    """q, k, v ``(B, H, N, d)`` of each block of a model with softmax attention, for normalised images."""
    blocks = model.attentions()
    with recorded(inputs_of=blocks) as tokens:
        model(images)
    found = []
    for block, x in zip(blocks, tokens, strict=True):
        q, k, v, *_ = block.project(x)
        found.append((q, k, v))
    return found


def replaced_accuracy(variant: Variant, weights: Path, config: ViTConfig, score: Callable[[ViT], float]) -> float:
    """Score of the trained model in the directory ``weights`` with its attention replaced and nothing trained.

    Args:
        variant: what takes the place of attention in every block; the mean over its draws is returned.
        weights: directory of the trained model.
        config: its configuration.
        score: gives a model its score.
    """
    changes = {"attention": variant.attention, "attention_options": variant.options}
    scores = []
    for draw in range(variant.draws):
        torch.manual_seed(draw)
        model = ViT(config.model_copy(update=changes))
        start_from(weights, model)
        set_untrained(model)
        scores.append(score(model.eval()))
    return fmean(scores)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; NaN for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return fmean(values) - half, fmean(values) + half
