"""One training by one process or by many: Fabric on the devices that there are, and sums over processes."""

import atexit
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from effvit import policy
from effvit.data.loading.batches import Place
from effvit.device import pick_device
from effvit.errors import UserError

_LEADER = "EFFVIT_LEADER"  # number of the process that starts the others
_LOOK_S = 1.0
_BUCKET_BYTES = 25 * 2**20  # as DDP has them


class _Unwrapped(DDPStrategy):
    """Processes as DDP has them, and the model as it is: `Exchange` sums gradients."""

    def setup_module(self, module: nn.Module) -> Any:
        return module


def make_fabric(device: str, devices: int = 1, precision: str = "32-true") -> Fabric:
    """Return Fabric on one or several ``auto``, ``cpu``, ``cuda`` or ``mps`` devices, its processes started.

    Under ``torchrun`` its processes are the ones there are, whatever ``devices`` says. Otherwise this script is started
    once more for each further device.

    Raises:
        UserError: there is no such device, or it does not have the precision.
    """
    # Before Fabric is built, which would report another precision in lines of its own.
    if precision == "16-mixed" and device != "cuda" and (device != "auto" or not torch.cuda.is_available()):
        raise UserError("precision=16-mixed: needs a CUDA device; try bf16-mixed or 32-true")
    nodes = 1
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    several = devices * nodes > 1
    strategy = _Unwrapped() if several else "auto"
    where = pick_device(device)
    precision = policy.training_precision(precision, where)
    which: Any = devices if several or where.index is None else [where.index]
    try:
        fabric = Fabric(accelerator=where.type, devices=which, num_nodes=nodes, strategy=strategy, precision=precision)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        asked = f"device={device}" + (f", devices={devices}" if devices > 1 else "")
        raise UserError(f"{asked}: not usable here, try auto or cpu ({error})") from error
    _watch_leader()
    try:
        fabric.launch()
    finally:
        os.environ.pop(_LEADER, None)
    if several:
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    return fabric


def _leave_group() -> None:
    """End gloo's threads while Python is whole: one that still holds a tensor after that aborts the process.

    Fabric does so itself for NCCL, and for no other.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _watch_leader() -> None:
    """Of a process that Fabric starts: end when the one that started it is killed, for which it else waits to meet."""
    leader = os.environ.get(_LEADER)
    if leader is None:
        os.environ[_LEADER] = str(os.getpid())
    else:
        threading.Thread(target=_leave_with, args=(int(leader),), daemon=True).start()


def _leave_with(leader: int) -> None:
    while os.getppid() == leader:
        time.sleep(_LOOK_S)
    os._exit(1)


def process_place(fabric: Fabric) -> Place:
    """Where this process stands among Fabric's."""
    return Place(fabric.device, fabric.global_rank, fabric.world_size)


class Exchange:
    """Sums of gradients over processes.

    Not by DDP's own hooks, which work inside the backward pass: there, a process without images in a last, small batch
    could not take part, and one that ran out of memory could not begin again. With several processes gradients are
    views of one buffer for each dtype, so that nothing is copied to send it.

    Args:
        fabric: its processes take part.
        parameters: whose gradients.
        stay: whether gradients stay where they are even with one process: CUDA graphs use their own memory again.
    """

    def __init__(self, fabric: Fabric, parameters: Iterable[nn.Parameter], *, stay: bool = False) -> None:
        self._buffers: list[Tensor] = []
        self._several = fabric.world_size > 1
        if not (self._several or stay):
            return
        of_dtypes: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            if parameter.requires_grad:
                of_dtypes[parameter.dtype].append(parameter)
        for dtype, alike in of_dtypes.items():
            sizes = [parameter.numel() for parameter in alike]
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=fabric.device)
            for parameter, part in zip(alike, buffer.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
            self._buffers.append(buffer)

    def clear(self, optimizer: Optimizer) -> None:
        """Forget all gradients."""
        for buffer in self._buffers:
            buffer.zero_()
        if not self._buffers:
            optimizer.zero_grad()

    def sum(self, figures: Tensor) -> Tensor:
        """Make gradients their sums over processes, and return those of ``figures``.

        Buckets are sent one after another and waited for together, with no barrier before.
        """
        if not self._several:
            return figures
        buckets = [part for buffer in self._buffers for part in buffer.split(_BUCKET_BYTES // buffer.element_size())]
        sent = [torch.distributed.all_reduce(part, async_op=True) for part in (*buckets, figures)]
        for each in sent:
            assert each is not None
            each.wait()
        return figures
