"""The primitives, each by the form that suits. Which form runs is decided here and nowhere else.

It depends on the device, dtype and sizes, on who watches (`effvit.kernels.choice`), and on what `effvit.policy` knows
of the processor. A function below takes what ``reference`` of its module takes and names a form; that is noted, for
the provenance of results, and run. With ``EFFVIT_KERNELS=reference`` it is always the equation.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from effvit import policy
from effvit.kernels import choice
from effvit.kernels import feature_attention as features_
from effvit.kernels import focus as focus_
from effvit.kernels import grid_convolution as grid_convolution_
from effvit.kernels import grid_pooling as grid_pooling_
from effvit.kernels import linear as linear_
from effvit.kernels import pseudo_inverse as pseudo_inverse_
from effvit.kernels import qkv as qkv_
from effvit.kernels import softmax_attention as softmax_
from effvit.kernels import token_convolution as token_convolution_
from effvit.kernels import token_means as token_means_
from effvit.kernels import token_projection as token_projection_
from effvit.kernels import turned_qkv as turned_qkv_
from effvit.kernels import window_attention as windows_
from effvit.kernels.feature_attention import Features
from effvit.kernels.qkv import Thirds
from effvit.kernels.token_projection import Projected
from effvit.kernels.window_attention import OfHeads

Grid = tuple[int, int]
P = ParamSpec("P")
R = TypeVar("R")
Form = Callable[..., R]

_HALF = (torch.bfloat16, torch.float16)
_SHORT, _LONG = 128, 1024  # tokens
_FEW_HEADS = 8192  # queries: of 2^17 tokens a GPU then has more multiprocessors than there are heads
_FEW_SEEN = 80  # tokens that a patch sees
_SMALL_HEAD = 2**13  # numbers


def primitive(module: ModuleType) -> Callable[[Callable[P, Form[R]]], Callable[P, R]]:
    """Make what chooses between the forms of a module run the one it chose."""

    def decorate(choose: Callable[P, Form[R]]) -> Callable[P, R]:
        name = choose.__name__

        @functools.wraps(choose)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if (step := choice.step_of(run, args, kwargs)) is not None:
                return step
            form = module.reference if policy.ONLY_REFERENCE else choose(*args, **kwargs)
            policy.note(name, form.__name__)
            return form(*args, **kwargs)

        return run

    return decorate


@primitive(linear_)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Form[Tensor]:
    """The fastest product for this processor."""
    others = (weight,) if bias is None else (weight, bias)
    return linear_.by_onednn if linear_.suits_onednn(x, *others) else linear_.by_pytorch


@primitive(qkv_)
def qkv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Form[Thirds]:
    """Three products on a CPU, one elsewhere."""
    if choice.on_cpu(x) and not torch.is_autocast_enabled("cpu"):
        return qkv_.as_three_products
    return qkv_.reference


def turns_maps(x: Tensor, omega: Tensor) -> bool:
    """Whether Ω ``(m, d)`` goes into the query and key maps: 2dC² products a batch in place of 2mC a token.

    In bfloat16 for any batch, as a sample's rounding, of Ωk̂ or of k̂, must not depend on it. Never in float16, in which
    Ωk̂ is out of range before k̂ is.
    """
    if not choice.on_cpu(x) or omega.shape[0] != omega.shape[1]:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16 or (dtype != torch.float16 and x.shape[0] * x.shape[1] > x.shape[2])


@primitive(turned_qkv_)
def turned_qkv(x: Tensor, weight: Tensor, bias: Tensor | None, omega: Tensor, scale: float) -> Form[Thirds]:
    """A map of its own, where `turns_maps`."""
    return _in_the_maps


def _in_the_maps(x: Tensor, weight: Tensor, bias: Tensor | None, omega: Tensor, scale: float) -> Thirds:
    return qkv(x, *turned_qkv_.turned(weight, bias, omega, scale))


@primitive(softmax_)
def softmax_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Form[Tensor]:
    """PyTorch's kernel, but where another is faster or it has no derivative."""
    if choice.in_forward_mode():
        return softmax_.reference
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows, columns = q.shape[-2], k.shape[-2]
    if q.device.type == "cuda" and trained and columns <= _SHORT and rows >= _FEW_HEADS:
        # FlashAttention's backward pass is parallel over blocks of 128 keys: here it would be one program per head.
        return softmax_.reference
    if q.device.type == "cpu" and v.dtype in _HALF:
        if trained and max(rows, columns) <= _SHORT:
            # In half precision the CPU's backward pass over sequences this short takes up to four times as long.
            return softmax_.in_float32
        pays = policy.LONG_ATTENTION_IN_FLOAT32 and choice.on_cpu(q, k, v)
        if not trained and min(rows, columns) >= _LONG and pays:
            return softmax_.in_float32_by_samples
    return softmax_.by_pytorch


@primitive(windows_)
def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float = 0.0) -> Form[Tensor]:
    """Triton; on a CPU products where windows are small; else PyTorch's kernel window by window."""
    if choice.in_forward_mode():
        return windows_.reference
    if windows_suit_triton(q, k, v, windows, dropout_p):
        return windows_.in_triton
    few = max(of_head.size for of_head in windows) ** 2 + k.shape[-2] - q.shape[-2] <= _FEW_SEEN
    if few and choice.on_cpu(q, k, v):
        return windows_.written_out
    if choice.eager_on_cuda(q, k, v):
        return windows_.by_copies
    if q.device.type == "cpu" and v.dtype in _HALF:
        # In half precision a CPU takes four times as long backward on sequences this short.
        return windows_.by_reshape_in_float32
    return windows_.by_reshape


def windows_suit_triton(q: Tensor, k: Tensor, v: Tensor, windows: OfHeads, dropout_p: float) -> bool:
    """Whether Triton takes these, the queries of patches or of all tokens."""
    if not choice.on_cuda(q, k, v) or dropout_p:
        return False
    from effvit.kernels.cuda.windows import MOST_PATCHES, MOST_PREFIX, WIDEST

    few = k.shape[-2] - windows[0].rows * windows[0].columns <= MOST_PREFIX
    few = few and max(of_head.size for of_head in windows) ** 2 <= MOST_PATCHES
    few = few and max(x.shape[2] * x.stride(2) for x in (q, k, v)) < 2**31  # or offsets would need 64 bits
    return few and q.numel() > 0 and v.numel() > 0 and max(k.shape[-1], v.shape[-1]) <= WIDEST


@primitive(features_)
def feature_attention(q: Tensor, k: Tensor, v: Tensor, features: Features, dropout_p: float = 0.0) -> Form[Tensor]:
    """Triton; on a CPU blocks, where intermediate results would not stay in its cache."""
    # The device first, as a batch that is exported has no size yet.
    if choice.on_cuda(q, k, v) and not dropout_p and _features_suit_triton(q, k, v, features):
        return features_.in_triton
    if features.kernel == "focused":
        return _focused_first
    if choice.on_cpu(q, k, v) and not dropout_p and _blocks_pay(k, features):
        return features_.by_blocks
    return features_.reference


def _focused_first(q: Tensor, k: Tensor, v: Tensor, features: Features, dropout_p: float = 0.0) -> Tensor:
    q, k = (focus(tokens, *features.scale_and_power()) for tokens in (q, k))
    return feature_attention(q, k, v, Features("identity", 0.0), dropout_p)


def _blocks_pay(k: Tensor, features: Features) -> bool:
    if features.kernel == "elu":  # of whose two parts PyTorch would keep all intermediate results
        return True
    if features.kernel == "softmax":  # which has few intermediate results
        return k.shape[-2] * k.shape[-1] <= _SMALL_HEAD
    return k.numel() > features_.BLOCK_NUMBERS


def _features_suit_triton(q: Tensor, k: Tensor, v: Tensor, features: Features) -> bool:
    from effvit.kernels.cuda.feature_attention import MOST_FEATURES, WIDEST

    if isinstance(features.scale, Tensor) and features.kernel == "exp":  # given features, which only a CPU is
        return False
    m = 0 if features.omega is None else len(features.omega)
    return q.numel() > 0 and k.shape[-2] > 0 and m <= MOST_FEATURES and max(k.shape[-1], v.shape[-1]) <= WIDEST


@primitive(focus_)
def focus(x: Tensor, scale: Tensor, power: float) -> Form[Tensor]:
    """Blocks, where nobody needs PyTorch's own operators."""
    return focus_.by_blocks if choice.on_cpu(x) or choice.eager_on_cuda(x, scale) else focus_.reference


@primitive(pseudo_inverse_)
def pseudo_inverse(a: Tensor, iterations: int) -> Form[Tensor]:
    """Triton for small matrices; else each difference inside a product."""
    if choice.on_cuda(a) and a.dtype == torch.float32 and a.numel() and _inverse_suits_triton(a):
        return pseudo_inverse_.in_triton
    return pseudo_inverse_.with_addends


def _inverse_suits_triton(a: Tensor) -> bool:
    from effvit.kernels.cuda.pseudo_inverse import LARGEST

    return a.shape[-1] <= LARGEST


@primitive(token_convolution_)
def token_convolution(x: Tensor, kernels: Tensor, residual: Tensor | None = None) -> Form[Tensor]:
    """Triton; else PyTorch's convolution of images."""
    tensors = (x, kernels) if residual is None else (x, kernels, residual)
    if choice.on_cuda(*tensors) and len({tensor.dtype for tensor in tensors}) == 1 and x.numel():
        return token_convolution_.in_triton
    return token_convolution_.with_fast_backward if choice.on_cpu(x, kernels) else token_convolution_.as_images


@primitive(grid_convolution_)
def grid_convolution(y: Tensor, v: Tensor, kernels: Tensor, grid_size: Grid) -> Form[Tensor]:
    """PyTorch's convolution of images."""
    if choice.on_cpu(y, v, kernels) and y.dtype == v.dtype == kernels.dtype:
        return grid_convolution_.in_few_passes
    return grid_convolution_.as_images


@primitive(grid_pooling_)
def grid_pooling(x: Tensor, grid_size: Grid, cells: Grid, members: Tensor | None = None) -> Form[Tensor]:
    """PyTorch's pooling, but on CUDA, where that adds its gradients up in no fixed order."""
    if cells == grid_size:
        return grid_pooling_.unchanged
    if x.device.type == "cuda":
        if members is not None:
            return grid_pooling_.by_members
        if not any(side % number for side, number in zip(grid_size, cells, strict=True)):
            return grid_pooling_.even
    return grid_pooling_.as_images


@primitive(token_means_)
def token_means(x: Tensor, members: Tensor) -> Form[Tensor]:
    """One product, which neither gathers tokens nor, backward, scatters their gradients."""
    return token_means_.as_product


@primitive(token_projection_)
def token_projection(x: Tensor, *projections: Tensor) -> Form[Projected]:
    """Batches of products; on CUDA one, which reads x once."""
    return token_projection_.at_once if x.device.type == "cuda" else token_projection_.one_by_one
