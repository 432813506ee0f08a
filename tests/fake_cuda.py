"""What of CUDA can be tested without a GPU: tensors that say they are there, and a record of what is done with them.

Fake tensors have shapes, dtypes and a device, and no numbers. So whatever needs a number on the host fails, and what
would block the host on a GPU can be counted.
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# Operators that give the host a number, or a tensor whose size is one.
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount"}


class Traffic(TorchDispatchMode):
    """Counts what makes the host wait for CUDA: ``uploads``, ``downloads`` and ``reads`` of numbers, and ``launches``."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.uploads: list[str] = []
        self.downloads: list[str] = []
        self.reads: list[str] = []
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if tensor.device.type == "cuda"]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_cuda = any(tensor.device.type == "cuda" for tensor in made)
        self.launches += bool(on_cuda and not function.is_view)
        if name in ("_to_copy", "copy_"):
            source = given[-1].device.type
            if on_cuda and source == "cpu":
                self.uploads.append(name)
            if source == "cuda" and not on_cuda:
                self.downloads.append(name)
        elif name == "lift_fresh" and on_cuda:  # torch.tensor(..., device="cuda")
            self.uploads.append("torch.tensor")
        elif there and name in _READ:
            self.reads.append(name)
        elif there and name.startswith("index") and any(t.dtype == torch.bool for t in given if t.ndim and t is not given[0]):
            self.reads.append(f"{name} by a mask")
        return result


class NoGPU(CPUAccelerator):
    """An accelerator that does not mind which device it sets up."""

    def setup_device(self, device: torch.device) -> None:
        pass


class AlreadyThere(SingleDeviceStrategy):
    """A strategy whose modules are on their device: fake tensors cannot be moved in place."""

    def module_to_device(self, module: nn.Module) -> None:
        pass


@contextmanager
def fake_cuda(monkeypatch: Any) -> Iterator[Traffic]:
    """Everything that is created here has no numbers; `training.loop` finds a GPU."""
    def make_fabric(*args: Any, **kwargs: Any) -> Fabric:
        return Fabric(strategy=AlreadyThere(device=CUDA, accelerator=NoGPU()))

    monkeypatch.setattr("effvit.training.loop.make_fabric", make_fabric)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", MagicMock)
    traffic = Traffic()
    with FakeTensorMode(allow_non_fake_inputs=True), traffic, torch.autograd.set_multithreading_enabled(False):
        yield traffic


def to_fake_cuda(model: nn.Module) -> nn.Module:
    """Put parameters and buffers there, shared ones once. To be called within `fake_cuda`."""
    there: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = there.setdefault(tensor, nn.Parameter(torch.empty_like(tensor, device=CUDA)))
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = there.setdefault(tensor, torch.empty_like(tensor, device=CUDA))
    return model
