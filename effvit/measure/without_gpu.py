"""Tensors that say they are on a GPU, for what can be known of CUDA without one.

They have shapes, dtypes and a device, and no numbers: underneath they are PyTorch's meta tensors. Whatever needs a
number of theirs on the host fails. Not FakeTensorMode, whose backward pass needs a driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from effvit.kernels import choice

CUDA, META = torch.device("cuda", 0), torch.device("meta")


class OnCuda(Tensor):
    """A tensor that says it is on a GPU."""

    of: Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        size, strides, dtype = inner.size(), inner.stride(), inner.dtype
        made = Tensor._make_wrapper_subclass(cls, size, strides, inner.storage_offset(), dtype=dtype, device=META)
        made.of = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(function, args, kwargs or {})


choice.STAND_INS.append(OnCuda)


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do with the meta tensors what is to be done, and give out as CUDA's what comes from them or asks to be there."""
    name, given = function.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(tensor, OnCuda) for tensor in given)
    if name == "_to_copy" and there and torch.device(kwargs.get("device") or CUDA).type == "cpu":
        return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
    if name == "copy_" and there and not isinstance(args[0], OnCuda):
        return args[0]
    wanted = kwargs.get("device")
    there = there or (wanted is not None and torch.device(wanted).type in ("cuda", "meta"))
    if not there:
        return function(*args, **kwargs)

    def to_meta(x: Any) -> Any:
        if isinstance(x, OnCuda):
            return x.of
        return x.to("meta") if isinstance(x, Tensor) else x

    on_meta = {
        key: META if key == "device" and value is not None else tree_map(to_meta, value)
        for key, value in kwargs.items()
    }
    out = function(*tree_map(to_meta, args), **on_meta)
    out = tree_map(lambda x: OnCuda(x) if isinstance(x, Tensor) else x, out)
    if function._schema.is_mutable or function.is_view:
        return return_and_correct_aliasing(function, args, kwargs, out)
    return out


def moved(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers there, shared ones once."""
    there: dict[Tensor, Any] = {}
    for each in module.modules():
        for name, tensor in each._parameters.items():
            if tensor is not None:
                on_cuda = OnCuda(tensor.detach().to("meta")).requires_grad_(tensor.requires_grad)
                each._parameters[name] = there.setdefault(tensor, nn.Parameter(on_cuda))
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = there.setdefault(buffer, OnCuda(buffer.to("meta")))
    return module


# What CUDA's autocast does with the functions that are called here; its lists are not to be had from Python.
_LOWER = {
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "mm",
    "addmm",
    "baddbmm",
    "conv2d",
    "scaled_dot_product_attention",
}
_FLOAT32 = {"layer_norm", "softplus", "exp", "pow", "norm", "reciprocal", "rsqrt"}
_FLOAT32_RESULT = {"softmax", "sum", "linalg_vector_norm"}
_WIDEST = {"addcmul"}


@cache
def _known_to_autocast() -> set[str]:
    """Operators that CUDA's autocast does something about."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    return {name.removeprefix("aten::").partition(".")[0] for name in registered}


class Cuda(TorchFunctionMode):
    """Do above autograd what CUDA does there: autocast, and the choice of a kernel for softmax attention.

    PyTorch's own code for both looks at where a tensor's memory is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[Tensor, Tensor] = {}  # weights, which autocast converts once

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = META  # which `run` makes CUDA's; PyTorch would look for a driver
        if torch.is_autocast_enabled("cuda") and any(isinstance(x, OnCuda) for x in tree_leaves((args, kwargs))):
            args, kwargs = self._autocast(name, args, kwargs)
        if name == "scaled_dot_product_attention" and isinstance(args[0], OnCuda):
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _autocast(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnCuda) and x.is_floating_point()]
        if name in _LOWER:
            dtype = torch.get_autocast_dtype("cuda")
        elif name in _FLOAT32:
            dtype = torch.float32
        elif name in _WIDEST and floats:
            dtype = torch.float32 if any(x.dtype == torch.float32 for x in floats) else floats[0].dtype
        elif name in _FLOAT32_RESULT:
            return args, kwargs if kwargs.get("dtype") else kwargs | {"dtype": torch.float32}
        elif name in _known_to_autocast():
            raise NotImplementedError(f"what autocast does with {name} is not written down here")
        else:
            return args, kwargs
        return tree_map(lambda x: self._to(x, dtype), (args, kwargs))

    def _to(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, OnCuda) or x.dtype == dtype or x.dtype not in (torch.float32, torch.bfloat16):
            return x
        if x.is_leaf and x.requires_grad and isinstance(x, nn.Parameter):
            return self._cast[x] if x in self._cast else self._cast.setdefault(x, x.to(dtype))
        return x.to(dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **kwargs: Any
) -> Tensor:
    """FlashAttention in half precision and without a mask; else the memory-efficient kernel, on padded masks."""
    if attn_mask is None and q.dtype != torch.float32:
        width = v.shape[-1]
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, False, False, **kwargs)[0][..., :width]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            hidden = attn_mask.logical_not()
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        columns = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -columns % 16))[..., :columns] if columns % 16 else attn_mask
        attn_mask = attn_mask.expand(*q.shape[:-1], columns)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, False, **kwargs)[0]


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Like ``torch.autocast("cuda", dtype)``, which refuses where there is no CUDA."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
