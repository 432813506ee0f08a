"""Training on tensors that say they are on a GPU, and a count of what would make the host wait for it.

Tensors of the CPU are real ones.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effvit import policy
from effvit.data.loading.batches import pack
from effvit.measure.without_gpu import CUDA, OnCuda, run

# Operators that give the host a number, or a tensor of a size that the host must know.
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount"}


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
def fake_cuda(monkeypatch: Any, memory: int = 0) -> Iterator[Traffic]:
    """Here ``device="cuda"`` gives tensors of `OnCuda`, and training finds a GPU of so many bytes."""

    def make_fabric(*args: Any, **kwargs: Any) -> Fabric:
        return Fabric(strategy=AlreadyThere(device=CUDA, accelerator=NoGPU()))

    with monkeypatch.context() as patch:
        patch.setattr("effvit.training.loop.make_fabric", make_fabric)
        patch.setattr("effvit.data.loading.batches.pack", lambda tensors, pinned: pack(tensors))
        patch.setattr(torch.cuda, "Event", MagicMock)
        patch.setattr("effvit.data.loading.resident._room", lambda device: memory // 10)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") shows as a copy
        try:
            with policy.kept(), Traffic() as traffic:
                yield traffic
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
