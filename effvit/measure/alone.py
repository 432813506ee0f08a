"""Measuring alone on a machine: a lock that all measurements share, and the load of whatever else runs there."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from effvit.device import gpu_uuid
from effvit.measure.nvml import others_on_gpu

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MOST_LOAD = 0.05  # share of the machine that others may take before a point counts as contended
_CLOCK_S = 0.02  # two ticks: what the kernel's count of processor time may be off by


@contextmanager
def measuring_alone(device: torch.device | None = None) -> Iterator[None]:
    """Wait until no other process on this machine measures, whoever's it is, and keep others waiting meanwhile.

    On a GPU, others on the same GPU.

    The lock is the kernel's, on a file that all users can read, so it ends with its holder, however that ends. Where
    two containers share processors but not ``/tmp``, ``EFFVIT_LOCK`` names a file that they do share.

    Raises:
        OSError: the file can be neither opened nor created.
    """
    shared = tempfile.gettempdir() if fcntl is None else "/tmp"  # not TMPDIR, which differs between processes
    path = Path(os.environ.get("EFFVIT_LOCK") or Path(shared, "effvit-measure.lock"))
    if device is not None and device.type == "cuda":
        path = path.with_name(f"{path.name}-{gpu_uuid(device)}")
    if fcntl is None:
        from filelock import FileLock

        with FileLock(path):
            yield
        return
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another measurement on this machine to end ({path})", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Load:
    """What others take from its making on: processor time (processes, the kernel, other machines), and a GPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._start = _clocks()
        on_gpu = device is not None and device.type == "cuda"
        self._of_gpu = others_on_gpu(gpu_uuid(device)) if on_gpu and device is not None else lambda: None

    def other_load(self) -> float:
        """Return the share of all processors that other programs had so far, or of the GPU if that is more, 0..1."""
        wall, others = self._passed()
        return min(1.0, max(0.0, others / wall, self._of_gpu() or 0.0))

    def contended(self) -> bool:
        """Whether that is too much for a measurement to be trusted."""
        wall, others = self._passed()
        return others > _MOST_LOAD * wall + _CLOCK_S or (self._of_gpu() or 0.0) > _MOST_LOAD

    def _passed(self) -> tuple[float, float]:
        """Processor seconds that the machine had, and those that others took."""
        wall, busy, own = (now - start for now, start in zip(_clocks(), self._start, strict=True))
        return max(wall, 1e-9) * (os.cpu_count() or 1), busy - own


def _clocks() -> tuple[float, float, float]:
    """Seconds by the wall, of all processors busy, and of this process."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")  # where the system has them
    return time.perf_counter(), sum(getattr(times, name, 0.0) for name in names), time.process_time()


def _open(path: Path) -> int:
    """Open for reading, which suffices for locking a file of another user's, and create it if need be."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        os.fchmod(descriptor, 0o644)  # whatever the user's mask
        return descriptor
