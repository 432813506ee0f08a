"""Independent commands, several at a time, each with its own device; each line of output names its command."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any

import torch

from effvit.processor import cores

_KEPT = 20  # last lines of a job that failed
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 15.0  # from Ctrl-C to SIGKILL; a training ends in its next step

_Handler = Callable[[int, FrameType | None], Any] | int | None  # of a signal


def places(count: int) -> list[dict[str, str]]:
    """Environment variables that give each of ``count`` jobs its GPU, and its share of the cores as threads."""
    return devices(count, _gpus(), os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // count)))


def usual_count(device: str) -> int:
    """Jobs at a time where nobody says: one for each GPU; without one, or on ``device`` cpu, two of half the cores."""
    return (torch.cuda.device_count() if device in ("auto", "cuda") else 0) or min(2, cores())


def _gpus() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them: those that it names, up to the first that is not there, or all."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if visible is None else visible.split(",")[:count]


def devices(count: int, gpus: Sequence[str], threads: str) -> list[dict[str, str]]:
    """Environment variables that give each of ``count`` jobs its device.

    Args:
        count: jobs at a time.
        gpus: names of GPUs as ``CUDA_VISIBLE_DEVICES`` takes them; jobs are dealt to them in turns.
        threads: of each job on the CPU.
    """
    place = {"OMP_NUM_THREADS": threads}
    if not gpus:
        return [place] * count
    return [place | {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(count)]


def run_all(
    commands: Mapping[str, Sequence[str]],
    places: Sequence[Mapping[str, str]],
    say: Callable[[str], None],
    interruptible: AbstractContextManager[None] | None = None,
) -> dict[str, tuple[int, list[str]]]:
    """Run all commands, as many at a time as there are places; one that fails stops no other.

    Whatever ends this ends the commands and what they started first, by SIGINT, and by SIGKILL 15 s later: Ctrl-C, a
    handler of SIGTERM that raises, and a terminal that closes, as that handler is SIGHUP's too. For the main thread.

    Args:
        commands: by name, a program and its arguments.
        places: environment variables of each place.
        say: is given each line that a command prints, after ``[name]``, and a line whenever one ended; one at a time.
        interruptible: entered while they get SIGINT, so that it can wait until that does no harm.

    Returns:
        By name, the exit status and last lines of those that failed.
    """
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for place in places:
        free.put(place)
    running: set[subprocess.Popen[str]] = set()
    failed: dict[str, tuple[int, list[str]]] = {}
    lock, stopped = threading.Lock(), threading.Event()
    saying = threading.Lock()  # not the same: a terminal that is stopped must not keep Ctrl-C from the jobs
    ended = 0

    def run(name: str) -> None:
        nonlocal ended
        place = free.get()
        try:
            with lock:
                if stopped.is_set():
                    return
                process = subprocess.Popen(
                    commands[name],
                    env=os.environ | place,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C reaches it through this process alone, and all that it started
                )
                running.add(process)
            threading.Thread(target=_clear, args=(process,), daemon=True).start()
            lines: deque[str] = deque(maxlen=_KEPT)
            assert process.stdout is not None, "piped above"
            for line in process.stdout:
                lines.append(line.rstrip())
                with saying:
                    say(f"[{name}] {lines[-1]}")
            status = process.wait()
            with saying:
                with lock:
                    running.discard(process)
                    ended += 1
                    if status:
                        failed[name] = status, list(lines)
                    bad = f", {len(failed)} failed" if failed else ""
                    left = f"{len(running)} running, {len(commands) - ended - len(running)} waiting"
                say(f"{ended} of {len(commands)} cells ended{bad}, {left}: {name} {'failed' if status else 'done'}")
        finally:
            free.put(place)

    handlers: dict[signal.Signals, _Handler] = {}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a shell's `command &`; the commands would inherit it
        handlers[signal.SIGINT] = _ignore
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        handlers[signal.SIGHUP] = signal.getsignal(signal.SIGTERM)
    with _handling(handlers), ThreadPoolExecutor(len(places)) as pool:
        try:
            for future in as_completed([pool.submit(run, name) for name in commands]):
                future.result()
        except BaseException:
            with _handling(dict.fromkeys(_ENDING, _ignore)):  # a second one must leave none behind
                with lock:
                    stopped.set()
                with interruptible or nullcontext(), lock:
                    left = list(running)
                    for process in left:
                        _signal(process, signal.SIGINT)
                _wait(left)
            raise
    return failed


def _ignore(number: int, frame: FrameType | None) -> None:
    """Unlike ``SIG_IGN``, no process that starts meanwhile inherits it."""


@contextmanager
def _handling(handlers: Mapping[signal.Signals, _Handler]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send it to a process and to all that it started; they may have ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _clear(process: subprocess.Popen[str]) -> None:
    """Where a process was killed, what it started would keep its device, with a result that nobody takes."""
    process.wait()
    _signal(process, signal.SIGKILL)


def _wait(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Until all have ended, by SIGKILL if need be."""
    until = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
