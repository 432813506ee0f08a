"""NVIDIA's management library, which the driver brings: what other programs do on a GPU."""

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache

_MOST_PROCESSES = 256
_OK, _NOTHING_FOUND = 0, 6


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Utilisation(ctypes.Structure):
    """Of one process since the last sample, in percent."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("time", ctypes.c_ulonglong),
        ("sm", ctypes.c_uint),
        ("memory", ctypes.c_uint),
        ("encoder", ctypes.c_uint),
        ("decoder", ctypes.c_uint),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The library, set up; None where there is none."""
    try:
        found = ctypes.CDLL("libnvidia-ml.so.1")
        return found if found.nvmlInit_v2() == _OK else None
    except (OSError, AttributeError):
        return None


def others_on_gpu(uuid: str) -> Callable[[], float | None]:
    """What tells, from now on, which share of a GPU the busiest other process took, 0..1.

    None where the driver does not say, or does not know this process by its number, as in some containers.
    """
    nvml, handle, since = library(), ctypes.c_void_p(), ctypes.c_ulonglong(int(time.time() * 1e6))
    if nvml is None or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != _OK:
        return lambda: None

    def share() -> float | None:
        there, count = (_Process * _MOST_PROCESSES)(), ctypes.c_uint(_MOST_PROCESSES)
        try:
            if nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), there) != _OK:
                return None
            if os.getpid() not in {process.pid for process in there[: count.value]}:
                return None
            used, count = (_Utilisation * _MOST_PROCESSES)(), ctypes.c_uint(_MOST_PROCESSES)
            status = nvml.nvmlDeviceGetProcessUtilization(handle, used, ctypes.byref(count), since)
        except AttributeError:  # an older driver
            return None
        if status not in (_OK, _NOTHING_FOUND):
            return None
        samples = used[: count.value] if status == _OK else []
        return max((each.sm / 100 for each in samples if each.pid != os.getpid()), default=0.0)

    return share
