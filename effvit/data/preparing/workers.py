"""Units read by several processes, which stop when one fails and do not outlive the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from effvit.data.preparing.units import Rows, Unit
from effvit.errors import UserError

_AHEAD = 3  # units per process that are read ahead of the one that is written

Reader = Callable[[Iterable[Unit]], Iterator[Rows]]
"""Gives what is stored of units, in their order."""


@contextmanager
def reader(processes: int) -> Iterator[Reader]:
    """Yield what reads units, in so many processes, or in this one where there is to be one.

    Memory is bounded by the number of processes: each holds one image and what is stored of a few units.

    Raises:
        UserError: while units are read, if a process was killed.
    """
    if processes < 2:
        yield lambda units: (unit.read(_nothing) for unit in units)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(processes, context, _start, (stop,)) as pool:
        try:
            yield partial(_read_ahead, pool, _AHEAD * processes)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _read_ahead(pool: ProcessPoolExecutor, ahead: int, units: Iterable[Unit]) -> Iterator[Rows]:
    units, waiting = iter(units), deque[Future[Rows]]()
    try:
        while True:
            waiting.extend(pool.submit(_read, unit) for unit in islice(units, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, perhaps for want of memory; run again with fewer workers to resume there"
        ) from error


class _Stopped(Exception):
    """Another unit failed, or the user interrupted."""


_stop: Any = None


def _start(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one answers it
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(unit: Unit) -> Rows:
    def check() -> None:
        if _stop.is_set():
            raise _Stopped

    return unit.read(check)


def _nothing() -> None:
    pass
