"""Energy of a call, where something counts it: NVIDIA's driver on a GPU, RAPL on processors of Intel and AMD.

A GPU counts itself alone. RAPL counts whole processor packages, whatever runs there, and Linux lets only root read it
unless told otherwise.
"""

import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from effvit.device import gpu_uuid
from effvit.measure.latency import Call
from effvit.measure.nvml import library as _nvml

Counter = Callable[[], float]
"""Joules since some moment."""
_RAPL = Path("/sys/class/powercap")
_FEWEST_S = 0.3  # a GPU's count is renewed every 20 to 100 ms


def energy_of(call: Call, budget_s: float, device: torch.device) -> float | None:
    """Joules of one call, the mean over as many as take ``budget_s``; None where nothing counts them."""
    counter = counter_of(device)
    if counter is None:
        return None
    calls, seconds = 0, max(budget_s, _FEWEST_S)
    call()
    _wait_for(device)
    before, started = counter(), time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        call()
        _wait_for(device)
        calls += 1
    return max(0.0, counter() - before) / calls


def counter_of(device: torch.device) -> Counter | None:
    """What counts the energy of a device; None where nothing does."""
    if device.type == "cuda":
        return _gpu_counter(gpu_uuid(device))
    return _rapl_counter(_RAPL) if device.type == "cpu" else None


def _rapl_counter(root: Path) -> Counter | None:
    """Sum over packages (``intel-rapl:0`` and so on, also on AMD's), each counting up to its largest number."""
    packages = [path for path in sorted(root.glob("intel-rapl:*")) if path.name.count(":") == 1]
    files = [path / "energy_uj" for path in packages]
    try:
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        last = [int(file.read_text()) for file in files]
    except (OSError, ValueError):
        return None
    if not files:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for number, file in enumerate(files):
            now = int(file.read_text())
            total += now - last[number] if now >= last[number] else now - last[number] + ranges[number]
            last[number] = now
        return total / 1e6

    return joules


def _gpu_counter(uuid: str) -> Counter | None:
    """The GPU's own counter (Volta and later), found by UUID, as NVML numbers GPUs otherwise than PyTorch."""
    library, handle = _nvml(), ctypes.c_void_p()
    if library is None or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
        return None
    if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(ctypes.c_ulonglong())) != 0:
        return None
    return partial(_joules_of_gpu, library, handle)


def _joules_of_gpu(library: ctypes.CDLL, handle: ctypes.c_void_p) -> float:
    value = ctypes.c_ulonglong()
    library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value))
    return value.value / 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
