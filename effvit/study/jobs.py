"""Independent commands, several at a time, each with its own device; each line of output names its command."""

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

_KEPT = 20  # last lines of a job that failed


def devices(count: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Environment variables that give each of ``count`` jobs its device.

    Args:
        count: jobs at a time.
        gpus: names of GPUs as ``CUDA_VISIBLE_DEVICES`` takes them; jobs are dealt to them in turns.
        cores: processors, of whose threads each job gets an equal share.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))}
    if not gpus:
        return [threads] * count
    return [threads | {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(count)]


def run_all(
    commands: Mapping[str, Sequence[str]], places: Sequence[Mapping[str, str]], say: Callable[[str], None]
) -> dict[str, tuple[int, list[str]]]:
    """Run all commands, as many at a time as there are places; one that fails stops no other.

    Args:
        commands: by name, a program and its arguments.
        places: environment variables of each place.
        say: is given each line that a command prints, after ``[name]``, and a line whenever one ended.

    Returns:
        By name, the exit status and last lines of those that failed.

    Raises:
        KeyboardInterrupt: Ctrl-C. It is passed on, and all commands have ended.
    """
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for place in places:
        free.put(place)
    running: set[subprocess.Popen[str]] = set()
    failed: dict[str, tuple[int, list[str]]] = {}
    lock, stopped = threading.Lock(), threading.Event()
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
            lines: deque[str] = deque(maxlen=_KEPT)
            assert process.stdout is not None, "piped above"
            for line in process.stdout:
                lines.append(line.rstrip())
                say(f"[{name}] {lines[-1]}")
            status = process.wait()
            with lock:
                running.discard(process)
                ended += 1
                if status:
                    failed[name] = status, list(lines)
                bad = f", {len(failed)} failed" if failed else ""
                say(f"{ended} of {len(commands)} cells ended{bad}: {name} {'failed' if status else 'done'}")
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(run, name) for name in commands]
        try:
            for future in futures:
                future.result()
        except BaseException:
            with lock:
                stopped.set()
                for process in running:
                    os.killpg(process.pid, signal.SIGINT)
            raise
    return failed
