"""jobs(n): prepare, then train and evaluate n cells at a time, each by a DVC of its own. `dvc repro` does the rest."""

import os
import subprocess
import sys

import torch

from effvit.errors import UserError, one_line_errors
from effvit.processor import cores
from effvit.study.jobs import devices, run_all
from stages import study

DVC = (sys.executable, "-m", "dvc")


def main() -> int:
    """Exit status: 0 if all cells are there."""
    params, arguments = study.load()
    count = _count(arguments)
    if status := subprocess.run([*DVC, "repro", "prepare"]).returncode:
        return status
    commands = {}
    for dataset in params.dataset:
        for attention in params.attention:
            for seed in params.seeds:
                cell = f"{dataset}-{attention}-{seed}"
                # DVCs take turns at dvc.lock and at looking for what changed; while a stage runs, none waits.
                repro = [*DVC, "--wait-for-lock", "repro", "--single-item", f"train@{cell}", f"evaluate@{cell}"]
                commands[cell] = repro
    places = devices(min(count, len(commands)), gpus(), cores())
    failed = run_all(commands, places, lambda line: print(line, flush=True))
    for cell, (status, lines) in failed.items():
        print(f"\n{cell} failed (exit status {status}); its last lines:", *lines, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


def _count(arguments: list[str]) -> int:
    if len(arguments) != 1 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        raise UserError(f"JOBS={' '.join(arguments)}: expected a whole number of cells at a time, from 1 on")
    return int(arguments[0])


def gpus() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them: those that it names, or all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(index) for index in range(torch.cuda.device_count())]


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
