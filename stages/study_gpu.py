"""study_gpu: what a GPU can say in 20 minutes, a CSV for each part under docs/machines: `make study-gpu`.

Each part has a time budget. What ends within it is written. The same command again measures again, and resumes
unfinished trainings.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.utils.hydra import compose_and_dump

from effvit import policy
from effvit.attention import available_attention
from effvit.device import Machine, measuring_device, this_machine
from effvit.errors import UserError, one_line_errors
from effvit.files import write_csv, write_json
from effvit.study.config import Study
from effvit.study.jobs import places, run_all
from stages import study

ROOT = Path(__file__).parents[1]
EFFVIT = (sys.executable, "-c", "from effvit.cli import main; main()")
Commands = dict[str, list[str]]
Run = Callable[[Commands, Sequence[Mapping[str, str]]], Mapping[str, Any]]
"""Runs commands, as many at a time as there are places; returns those that failed."""


@dataclass(frozen=True)
class Part:
    """Commands, as many rounds one after another as there are, and the table of what they wrote."""

    minutes: float
    rounds: list[Commands]
    table: Callable[[], pd.DataFrame]
    at_once: int = 1


@dataclass(frozen=True)
class Size:
    """How much of it: `FULL` is for a GPU of 80 GB, `DRY` for any CPU."""

    mechanisms: tuple[str, ...]
    blocks: dict[str, str]  # options of `effvit scaling`
    compiled: dict[str, str]
    equations: dict[str, str]  # of mechanisms with kernels in Triton, by PyTorch's operators alone
    peers: dict[str, str]  # options of `effvit bench-peers`
    images: dict[str, tuple[int, ...]]  # sizes in pixels for each model; with the first one it is trained
    batch_size: int
    budget_s: float  # of a measurement
    cells: tuple[str, ...]  # settings of the trainings, as after -S
    minutes: dict[str, float]  # of each part


_IN_TRITON = ("performer", "nystromformer", "hybrid", "linear", "focused", "window")
_BLOCKS = {
    "model": "small",
    "width": "384x6,192x3",
    "tokens-per-batch": "131072",
    "memory-mib": "16384",
    "patch-size": "16",
}
FULL = Size(
    mechanisms=available_attention(),
    blocks=_BLOCKS | {"tokens": "197,401,1025,2305,4097,16385,65537", "precision": "bfloat16", "budget-s": "0.05"},
    # A compilation takes seconds, and each mechanism has one for each length, pass and model.
    compiled=_BLOCKS
    | {"width": "384x6", "tokens": "1025", "precision": "bfloat16", "execution": "compiled", "budget-s": "0.05"},
    equations=_BLOCKS | {"width": "384x6", "tokens": "197,1025,4097", "precision": "bfloat16", "budget-s": "0.05"},
    peers={
        "width": "384x6",
        "tokens": "197,1025,4097",
        "dtype": "bfloat16",
        "tokens-per-batch": "65536",
        "budget-s": "0.2",
    },
    images={"tiny": (32, 64), "small": (32, 64), "deit_tiny": (224, 448), "deit_small": (224, 448)},
    batch_size=128,
    budget_s=10.0,
    cells=("dataset=cifar10", "model=small", "attention=field", "train=long", "train.epochs=100", "seeds=[0,1,2]"),
    minutes={"blocks": 4, "compiled": 3, "equations": 1, "peers": 2, "models": 3, "cells": 7},
)
DRY = Size(
    mechanisms=("linear",),
    blocks={"tokens": "17", "width": "16x2", "hidden-size": "16", "budget-s": "0.01", "tokens-per-batch": "34"},
    compiled={},
    equations={},
    peers={},
    images={"tiny": (16,)},
    batch_size=64,
    budget_s=0.1,
    cells=("dataset=digits", "attention=[uniform]", "train.epochs=1", "train.batch_size=256"),
    minutes={"blocks": 5, "models": 5, "cells": 5},
)


def parts(size: Size, machine: Machine, device: str, work: Path, results: Path, jobs: int) -> dict[str, Part]:
    """What is to be done, by name.

    Args:
        size: how much.
        machine: this one.
        device: cuda or cpu.
        work: folder for what is in between, kept so that trainings can continue.
        results: folder of tables of all machines, to which `effvit choose` adds its own.
        jobs: trainings at a time.
    """
    made = {}
    for name, command, options, file in (
        ("blocks", "scaling", size.blocks, "scaling.csv"),
        ("compiled", "scaling", size.compiled, "scaling.csv"),
        ("equations", "scaling", size.equations, "scaling.csv"),
        ("peers", "bench-peers", size.peers, "peers.csv"),
    ):
        if options:
            made[name] = _of_mechanisms(size, name, command, options, file, device, work / name)
    made["models"] = _models(size, machine, device, work, results)
    made["cells"] = _cells(size, device, work / "cells", jobs)
    return made


def _of_mechanisms(
    size: Size, part: str, command: str, given: dict[str, str], file: str, device: str, work: Path
) -> Part:
    """A command for each mechanism, and the file that it writes."""
    flags = [word for key, value in given.items() for word in (f"--{key}", value)]
    before = ["env", "EFFVIT_KERNELS=reference"] if part == "equations" else []
    names = [name for name in size.mechanisms if part != "equations" or name in _IN_TRITON]
    commands = {
        f"{part} {name}": [*before, *_effvit(command, attention=name, device=device, output_dir=work / name), *flags]
        for name in names
    }
    tables = partial(_joined, {name: work / name / file for name in names})
    return Part(size.minutes[part], [commands], tables)


def _models(size: Size, machine: Machine, device: str, work: Path, results: Path) -> Part:
    """Training's speed next to timm's on the digits, which need no download, and the fastest mechanism."""
    prepared = {pixels: work / f"digits{pixels}" for pixels, *_ in size.images.values()}
    first = {
        f"digits of {pixels} pixels": _effvit("prepare", dataset="digits", image_size=pixels, output_dir=path)
        for pixels, path in prepared.items()
    }
    common = {"device": device, "budget_s": size.budget_s}
    precision = "bfloat16" if device == "cuda" else "float32"
    second, files = {}, {}
    for model, sizes in size.images.items():
        out = work / "training" / model
        given = {"model": model, "dataset_dir": prepared[sizes[0]], "output_dir": out, "batch_size": size.batch_size}
        second[f"training {model}"] = _effvit("bench-data", **given, **common)
        files[model] = out / "throughput.csv"
        given = {
            "model": model,
            "image_sizes": ",".join(map(str, sizes)),
            "batch_size": size.batch_size,
            "output": results,
        }
        second[f"fastest {model}"] = _effvit(
            "choose", attention=",".join(("fused", *size.mechanisms)), precision=precision, **given, **common
        )
    return Part(size.minutes["models"], [first, second], partial(_joined, files, key="model"))


def _cells(size: Size, device: str, work: Path, jobs: int) -> Part:
    """Trainings by the stages of the study, with params.yaml of their own."""
    work.mkdir(parents=True, exist_ok=True)
    compose_and_dump(
        str(work / "params.yaml"), str(ROOT / "conf"), None, "config", "", [*size.cells, f"train.device={device}"]
    )
    params = Study.load(work / "params.yaml")

    def stage(name: str, *items: object) -> list[str]:
        python = f"PYTHONPATH={ROOT}", sys.executable, "-m", f"stages.{name}"
        return ["env", "-C", str(work), *python, *map(str, items)]

    cells = [(data, name, seed) for data in params.dataset for seed in params.seeds for name in params.attention]
    rounds = [{f"prepare {data}": stage("prepare", data) for data in params.dataset}]
    for first in range(0, len(cells), jobs):  # evaluated before the next are trained, for which time may not do
        for what in ("train", "evaluate"):
            rounds.append({" ".join(map(str, cell)): stage(what, *cell) for cell in cells[first : first + jobs]})

    def table() -> pd.DataFrame:
        rows = []
        for data, name, seed in cells:
            logs = work / study.cell_dir(data, name, str(seed))
            if (logs / "evaluate/evaluation.json").exists():
                scores = json.loads((logs / "evaluate/evaluation.json").read_text(encoding="utf-8"))
                seconds = pd.read_csv(logs / "train/timing.csv")["seconds"]
                row = {"dataset": data, "model": params.model.hidden_size, "attention": name, "seed": seed}
                rows.append(row | {"top1": scores["top1"], "epochs": len(seconds), "train_s": seconds.sum()})
        return pd.DataFrame(rows)

    return Part(size.minutes["cells"], rounds, table, jobs)


def _effvit(command: str, **given: object) -> list[str]:
    return [
        *EFFVIT,
        command,
        *(word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))),
    ]


def _joined(files: Mapping[str, Path], key: str = "attention") -> pd.DataFrame:
    """Tables that are there, one below the other, each with its name."""
    there = {name: pd.read_csv(file) for name, file in files.items() if file.exists()}
    tables = [table.assign(**{key: name}) for name, table in there.items()]
    joined = pd.concat(tables) if tables else pd.DataFrame(columns=[key])
    return joined[[key, *joined.columns.drop(key)]]


def folder_of(machine: Machine) -> str:
    """Name of a machine's folder: its chip, and the PyTorch that ran."""
    return re.sub(r"[^\w.]+", "-", f"{machine.name}-torch-{machine.torch}").strip("-")


class OutOfTime(Exception):
    """The minutes of a part are over."""


@contextmanager
def at_most(minutes: float) -> Iterator[None]:
    """Raise `OutOfTime` inside after so many minutes."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(chosen: Mapping[str, Part], machine: Machine, output: Path, run: Run) -> dict[str, dict[str, Any]]:
    """Run parts one after another; write each part's table, and what became of it in study.json."""
    output.mkdir(parents=True, exist_ok=True)
    became: dict[str, dict[str, Any]] = {}
    for name, part in chosen.items():
        failed: list[str] = []
        in_time, started = True, time.monotonic()
        devices = places(part.at_once) if part.at_once > 1 else [{}]
        try:
            with at_most(part.minutes):
                for commands in part.rounds:
                    failed += run(commands, devices)
        except OutOfTime:
            in_time = False
        table = part.table()
        if not table.empty:
            write_csv(output / f"{name}.csv", table.assign(machine=machine.name, torch=machine.torch))
        became[name] = {"in_time": in_time, "failed": failed, "rows": len(table)}
        became[name]["minutes"] = round((time.monotonic() - started) / 60, 2)
        write_json(output / "study.json", {"machine": asdict(machine), "parts": became})
        print(f"{name}: {became[name]}", flush=True)
    return became


def main() -> int:
    """Exit status: 0 where everything ran, in time or not."""
    parser = argparse.ArgumentParser(prog="python -m stages.study_gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help="blocks, compiled, equations, peers, models, cells; all by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a dry run of small sizes")
    parser.add_argument("--jobs", type=int, default=6, help="trainings at a time")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/machines"))
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir(), "effvit-study-gpu"))
    given = parser.parse_args()
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: expected at least 1 training at a time")
    where = measuring_device(given.device)
    with policy.kept():
        policy.apply(where, deterministic=True)
        machine = this_machine(where)
    size = FULL if given.device == "cuda" else DRY
    results, work = given.output_dir.resolve(), given.work_dir.resolve()
    known = parts(size, machine, given.device, work, results, given.jobs)
    if unknown := set(given.parts) - set(known):
        raise UserError(f"{unknown.pop()}: unknown part, expected one of {', '.join(known)}")
    chosen = {name: part for name, part in known.items() if not given.parts or name in given.parts}
    say = partial(print, flush=True)
    became = run_parts(chosen, machine, results / folder_of(machine), lambda *job: run_all(*job, say))
    return 1 if any(each["failed"] for each in became.values()) else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
