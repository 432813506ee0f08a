"""jobs(n): prepare, then train, evaluate and deploy n cells at a time, each by a DVC of its own.

`dvc repro` does the rest, and all of it where n is 1. Without n, two at a time, or one on each GPU.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dvc.lock import LockError
from dvc.repo import Repo

from effvit.errors import UserError, one_line_errors
from effvit.study.jobs import places, run_all, usual_count
from stages import restore, study

# DVCs take turns at dvc.lock and at looking for what changed; while a stage runs, none waits.
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro")
_PATIENCE_S = 10.0  # for the DVC that has the lock; one that builds the graph of thousands of stages has it for longer


def main() -> int:
    """Exit status: 0 if all cells are there."""
    params, arguments = study.load()
    devices = params.train.devices
    count = _count(arguments) if arguments else usual_count(params.train.device) if devices == 1 else 1
    if count > 1 and devices > 1:
        raise UserError(f"JOBS={count}: each cell has one device, but train.devices is {devices}")
    restore.main()
    if count == 1:
        return 0
    repro = [*DVC, "--pull"] if Repo().config["core"].get("remote") else [*DVC]
    if status := subprocess.run([*repro, "prepare"]).returncode:
        return status
    commands = {}
    for dataset in params.dataset:
        for attention in params.attention:
            for seed in params.seeds:
                cell = f"{dataset}-{attention}-{seed}"
                stages = [f"train@{cell}", f"evaluate@{cell}"]
                if seed == params.seeds[0]:
                    stages.append(f"deploy@{dataset}-{attention}")
                commands[cell] = [*repro, "--single-item", *stages]
    failed = run_all(
        commands, places(min(count, len(commands))), lambda line: print(line, flush=True), _no_dvc_writes()
    )
    for cell, (status, lines) in failed.items():
        print(f"\n{cell} failed (exit status {status}); its last lines:", *lines, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


def _count(arguments: list[str]) -> int:
    if len(arguments) != 1 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        raise UserError(f"JOBS={' '.join(arguments)}: expected a whole number of cells at a time, from 1 on")
    return int(arguments[0])


@contextmanager
def _no_dvc_writes() -> Iterator[None]:
    """Hold DVC's lock: a DVC that is ended while it writes dvc.lock or its list of paths in use leaves half of it."""
    lock = Repo().lock
    until = time.monotonic() + _PATIENCE_S
    while not lock.is_locked and time.monotonic() < until:
        with suppress(LockError):
            lock.lock()  # or 3 s
    try:
        yield
    finally:
        if lock.is_locked:
            lock.unlock()


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
