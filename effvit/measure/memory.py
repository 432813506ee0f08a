"""Peak memory of a call: exact bytes of live tensors, buffers inside operators included."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import MEMORY_EVENT_NAME

MIB = 2**20

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports on stderr at every use otherwise


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call holds at its peak above what was resident before it.

    On CUDA these are the caching allocator's bytes, on CPU the bytes asked of PyTorch's allocator; scratch memory
    that libraries allocate by themselves is in neither. Call once beforehand where the first call is different.
    """
    with no_garbage_collection():
        return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python from collecting garbage meanwhile: it takes time, and frees what was resident before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def resident_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    return _bytes(module.parameters()) + _bytes(module.buffers())


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Callable[[], object]) -> int:
    with profile(profile_memory=True) as profiler:
        call()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == MEMORY_EVENT_NAME]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
