"""Memory of a process: how much it had at most, and whether there was too little."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_WORDS = (
    "not enough memory",
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "storage size calculation overflowed",  # more than any memory
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "unable to find an engine",  # of cuDNN's: none whose workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on any device."""
    import torch  # not for the other functions here, whose process may do without

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def peak_resident_bytes() -> int:
    """Most bytes that were resident since this process started."""
    if _STATUS.exists():
        # Not getrusage: on Linux its maximum is inherited from the process that started this one.
        return status_bytes("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def status_bytes(field: str) -> int:
    """Bytes that Linux reports of this process under a name as in ``/proc/self/status``."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
