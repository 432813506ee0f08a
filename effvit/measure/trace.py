"""What an attention block asks of a GPU, without one: kernels launched and bytes moved, forward and backward.

An operator counts as one launch, whatever its kernels are inside, and views as none. It moves each of its tensors once:
what it reads and what it writes, of tensors repeated by a stride of zero only what is in memory.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effvit.attention import Attention
from effvit.attention.linformer import LinformerAttention
from effvit.attention.nystromformer import NystromformerAttention
from effvit.attention.pooled import PooledAttention
from effvit.attention.standard import StandardAttention
from effvit.attention.uniform import UniformAttention
from effvit.measure.subject import Block
from effvit.measure.without_gpu import Cuda, OnCuda, autocast, moved, run

MOST_FORWARD, MOST_BACKWARD, MOST_RATIO = 40, 80, 2.0
"""The budget of a block: launches of each pass, and bytes of both relative to `least_bytes`."""
_NOTHING = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "alias"}
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"}


class Launches(TorchDispatchMode):
    """Counts what is launched on CUDA while it is on, and the bytes that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = run(function, args, kwargs)
        name = function.overloadpacket.__name__
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, OnCuda)]
        if written and not (function.is_view or name in _NOTHING or "empty" in name):
            for argument, value in () if _is_new(name) else _arguments(function, args, kwargs):
                changed = argument.alias_info is not None and argument.alias_info.is_write
                if not changed or not (argument.kwarg_only or name in _OVERWRITES):
                    written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, OnCuda)]
            self.calls.append((name, sum(map(bytes_of, written))))
        return result


def _is_new(name: str) -> bool:
    """Whether an operator looks only at the shape of what it is given."""
    return name.startswith("new_") or name.endswith("_like")


def _arguments(function: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Arguments as the operator declares them, with their values."""
    declared = function._schema.arguments
    named = {argument.name: argument for argument in declared}
    return [*zip(declared, args, strict=False), *((named[name], value) for name, value in kwargs.items())]


def bytes_of(tensor: Tensor) -> int:
    """Bytes in memory, of a dimension whose stride is zero only once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


@dataclass(frozen=True)
class Pass:
    """Of one pass: name and bytes of each launch, in order."""

    calls: list[tuple[str, int]]

    @property
    def launches(self) -> int:
        return len(self.calls)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.calls)


@dataclass(frozen=True)
class Traced:
    """Both passes of a block in training, and `least_bytes` of both together."""

    forward: Pass
    backward: Pass
    least_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of both passes, relative to the minimum."""
        return (self.forward.bytes + self.backward.bytes) / self.least_bytes


def shown(traced: Traced) -> list[tuple[str, bool]]:
    """Launches forward and backward, GB forward and backward, the ratio; each with whether it is above the budget."""
    return [
        (str(traced.forward.launches), traced.forward.launches > MOST_FORWARD),
        (str(traced.backward.launches), traced.backward.launches > MOST_BACKWARD),
        (f"{traced.forward.bytes / 1e9:.2f}", False),
        (f"{traced.backward.bytes / 1e9:.2f}", False),
        (f"{traced.ratio:.1f}", traced.ratio > MOST_RATIO),
    ]


def trace_block(block: Block, tokens: int, batch_size: int, *, bfloat16: bool) -> Traced:
    """Forward and backward pass of a block in training, down to the tokens, as between the norms of a model.

    Args:
        block: the block.
        tokens: token count, 1 + n².
        batch_size: samples.
        bfloat16: whether it runs under autocast, on tokens in float32 as a norm gives them.
    """
    module = block.build(tokens).train()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    least = least_bytes(module, batch_size, dtype)
    moved(module)
    x = OnCuda(torch.empty(batch_size, tokens, block.dim, device="meta")).requires_grad_()
    with Cuda(), Launches() as forward, autocast(dtype) if bfloat16 else nullcontext():
        y = module(x)
    gradient = OnCuda(torch.empty(y.shape, dtype=y.dtype, device="meta"))
    with Launches() as backward:
        y.backward(gradient)
    return Traced(Pass(forward.calls), Pass(backward.calls), sum(least))


def least_bytes(block: Attention, batch_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that no implementation of a mechanism in three kernels could do without: forward and backward.

    The kernels are the maps (x to q, k, v), the mixing (to y) and the projection. Each reads its inputs, weights and
    what the forward pass kept once, and writes its results once. With r rows of q and y and m of k and v, of C numbers
    of b bytes, N tokens x in float32 and W weights in float32::

        forward   4N + b (r + 2m)  |  b (r + 2m + r)  |  b (r + N)     rows, and 4W
        backward  b (r + N + r)  |  b (r + r + 2 (r + 2m))  |  b (r + 2m + N) + 4N   rows, and 8W

    r is N, and so is m but where keys and values are few (`linformer`, `pooled`). What is of a fixed size for each
    head (landmarks, sums over features) is left out. Three mechanisms have another mixing:

    - `standard` has its N x N matrices of H heads in memory, as that is what tells it from `fused`: scores and
      probabilities are each written and read once forward, and backward the gradients of both too, those of the scores
      read for q and for k, and the probabilities read for v and for the softmax: b 4HN² / C | b 7HN² / C rows more.
    - `uniform` reads v, and writes its one row for every token, as the projection is that of all: b 2N | b 2N.
    - `nystromformer` cannot begin before it has its landmarks, which are means of all q and k. It reads q and k for
      them, k and v for K₃ v, q and v for y and the convolution: b 7N. Backward it reads ∂y, q and v for ∂(Z K₃ v) and
      the convolution's weights, then ∂y, k and v for ∂k and ∂v, then ∂y and q for ∂q: b 11N.
    """
    n, b = block.num_tokens, dtype.itemsize
    weights = sum(parameter.numel() for parameter in block.parameters())
    row = batch_size * block.dim
    if isinstance(block, UniformAttention):
        forward = (4 * n + b * n) + b * 2 * n + b * 2 * n
        backward = b * 3 * n + b * 2 * n + (b * 2 * n + 4 * n)
    else:
        m = n
        if isinstance(block, LinformerAttention) and block.share != "none":
            m = block.k
        if isinstance(block, PooledAttention):
            m = block.num_pooled
        thirds = n + 2 * m
        forward = (4 * n + b * thirds) + b * (thirds + n) + b * 2 * n
        backward = b * 3 * n + b * (2 * n + 2 * thirds) + (b * (thirds + n) + 4 * n)
        if isinstance(block, NystromformerAttention) and block.has_landmarks:
            forward, backward = forward + b * 3 * n, backward + b * 3 * n
    matrix = batch_size * block.num_heads * b * n**2 if isinstance(block, StandardAttention) else 0
    return forward * row + 4 * matrix + 4 * weights, backward * row + 7 * matrix + 8 * weights
