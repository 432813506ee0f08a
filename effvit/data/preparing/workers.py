"""Shards written by several processes, which stop when one fails and do not outlive the one that started them."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from effvit.data.preparing.progress import image_bar
from effvit.data.preparing.shards import Shard, Tally, make_room
from effvit.errors import UserError

_POLL_SECONDS = 0.25


def write_shards(shards: Sequence[Shard], workers: int, bar: str) -> Tally:
    """Write all shards of one stored part that are not finished, with up to ``workers`` processes and a progress bar.

    Damaged images are counted in what is returned; the others are read nevertheless. Memory is bounded by the number of
    workers: each holds one image and one record batch of JPEGs.

    Raises:
        UserError: a worker was killed.
    """
    earlier = [shard.finished() for shard in shards]
    missing = [shard for shard, tally in zip(shards, earlier, strict=True) if tally is None]
    total = Tally()
    for tally in filter(None, earlier):
        total.add(tally)
    make_room(shards)
    images = sum(map(len, shards))
    with image_bar(bar, images, already=images - sum(map(len, missing))) as at:
        if min(workers, len(missing)) > 1:
            _in_processes(missing, min(workers, len(missing)), at, total)
        else:
            count = itertools.count(1)
            for shard in missing:
                total.add(shard.write(lambda: at(next(count))))
    return total


def _in_processes(shards: Sequence[Shard], workers: int, at: Callable[[int], None], total: Tally) -> None:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (counter, stop)) as pool:
        waiting = {pool.submit(_write, shard) for shard in shards}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    total.add(future.result())
                at(counter.value)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps for want of memory; run again with fewer workers to resume there"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another shard failed, or the user interrupted."""


_shared: tuple[Any, Any] = (None, None)


def _start(counter: Any, stop: Any) -> None:
    global _shared
    _shared = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one answers it
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(shard: Shard) -> Tally:
    counter, stop = _shared

    def on_image() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise _Stopped

    return shard.write(on_image)
