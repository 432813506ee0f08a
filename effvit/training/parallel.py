"""One training by one process or by many: Fabric on the devices that there are, and sums over processes."""

import atexit
import os
import threading
import time
from collections.abc import Iterable

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from effvit import policy
from effvit.data.loading.batches import Place
from effvit.device import pick_device
from effvit.errors import UserError

_LEADER = "EFFVIT_LEADER"  # number of the process that starts the others
_LOOK_S = 1.0


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
    # cuBLAS is deterministic only with a workspace of fixed size, set before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    nodes = 1
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    several = devices * nodes > 1
    # Buffers change by seeded draws, alike in all processes: nothing to broadcast before each forward pass.
    strategy = DDPStrategy(broadcast_buffers=False) if several else "auto"
    precision = policy.training_precision(precision, where := pick_device(device))
    try:
        fabric = Fabric(
            accelerator=where.type, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision
        )  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        which = f"device={device}" + (f", devices={devices}" if devices > 1 else "")
        raise UserError(f"{which}: not usable here, try auto or cpu ({error})") from error
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


def sum_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter], figures: Tensor) -> Tensor:
    """Replace gradients by their sums over processes, and return those of ``figures`` ``(n,)``, in one exchange.

    Not by DDP's own hooks, which work inside the backward pass: there, a process without images in a last, small batch
    could not take part, and one that ran out of memory could not begin again.
    """
    if fabric.world_size == 1:
        return figures
    trained = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([*(g.flatten() for g in gradients), figures.to(gradients[0].dtype)])
    total = fabric.all_reduce(flat, reduce_op="sum")
    assert isinstance(total, Tensor)
    *sums, figures = total.split([*(g.numel() for g in gradients), len(figures)])
    for parameter, gradient in zip(trained, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return figures
