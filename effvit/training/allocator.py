"""Memory that a training step frees is kept for the next one."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what glibc allows


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the process, where glibc is the C library; return whether it is.

    By default it gives large blocks back to the system whenever they are freed at the top of its heap, and a step that
    allocates its activations anew then waits for thousands of page faults. Blocks above 32 MiB are still mapped each
    by itself and given back. The process keeps its peak of memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
