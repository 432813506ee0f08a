"""What of CUDA can be tested without a GPU: tensors that say they are there, and a record of what is done with them.

They have shapes, dtypes and a device, and no numbers (underneath they are PyTorch's meta tensors). So whatever needs a
number of theirs on the host fails, and what would make the host wait for a GPU can be counted. Tensors of the CPU are
real ones. Not FakeTensorMode, whose backward pass needs a driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from effvit.kernels import choice

CUDA = torch.device("cuda", 0)
# Operators that give the host a number, or a tensor of a size that the host must know.
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount"}


class OnCuda(Tensor):
    """A tensor that says it is on a GPU."""

    inner: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        size, strides, dtype = inner.size(), inner.stride(), inner.dtype
        made = Tensor._make_wrapper_subclass(cls, size, strides, inner.storage_offset(), dtype=dtype, device="meta")
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


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
            return x.inner
        return x.to("meta") if isinstance(x, Tensor) else x

    on_meta = {
        key: torch.device("meta") if key == "device" and value is not None else to_meta_all(value, to_meta)
        for key, value in kwargs.items()
    }
    out = function(*to_meta_all(args, to_meta), **on_meta)
    out = tree_map(lambda x: OnCuda(x) if isinstance(x, Tensor) else x, out)
    if function._schema.is_mutable or function.is_view:
        return return_and_correct_aliasing(function, args, kwargs, out)
    return out


def to_meta_all(values: Any, to_meta: Any) -> Any:
    return tree_map(to_meta, values)


class Traffic(TorchDispatchMode):
    """Counts what makes the host wait: copies to and from CUDA, and numbers read; and all that is launched there."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.uploads: list[str] = []
        self.downloads: list[str] = []
        self.reads: list[str] = []
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, OnCuda) for tensor in given):
            masked = any(tensor.dtype == torch.bool and tensor.ndim for tensor in given[1:])
            if name in _READ or (name.startswith(("index", "_index")) and masked):
                self.reads.append(name)
        result = run(function, args, kwargs)
        on_cuda = any(isinstance(leaf, OnCuda) for leaf in tree_leaves(result))
        self.launches += bool(on_cuda and not function.is_view)
        if name in ("_to_copy", "copy_"):
            if on_cuda and not isinstance(given[-1], OnCuda):
                self.uploads.append(name)
            if isinstance(given[-1], OnCuda) and not on_cuda:
                self.downloads.append(name)
        return result


class NoGPU(CPUAccelerator):
    """An accelerator that does not mind which device it sets up."""

    def setup_device(self, device: torch.device) -> None:
        pass


class AlreadyThere(SingleDeviceStrategy):
    """A strategy whose modules are on their device."""

    def module_to_device(self, module: nn.Module) -> None:
        pass


@contextmanager
def fake_cuda(monkeypatch: Any) -> Iterator[Traffic]:
    """Here ``device="cuda"`` gives tensors of `OnCuda`, and training finds a GPU."""

    def make_fabric(*args: Any, **kwargs: Any) -> Fabric:
        return Fabric(strategy=AlreadyThere(device=CUDA, accelerator=NoGPU()))

    with monkeypatch.context() as patch:
        patch.setattr("effvit.training.loop.make_fabric", make_fabric)
        patch.setattr(choice, "_WITHOUT_DATA", (*choice._WITHOUT_DATA, OnCuda))
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.cuda, "Event", MagicMock)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") shows as a copy
        try:
            with Traffic() as traffic:
                yield traffic
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def to_fake_cuda(model: nn.Module) -> nn.Module:
    """Put parameters and buffers there, shared ones once."""
    there: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                moved = OnCuda(tensor.detach().to("meta")).requires_grad_(tensor.requires_grad)
                module._parameters[name] = there.setdefault(tensor, nn.Parameter(moved))  # type: ignore[assignment]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = there.setdefault(tensor, OnCuda(tensor.to("meta")))
    return model
