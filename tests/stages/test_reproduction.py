"""The study under real DVC, in a scratch repository on a tiny recipe: what `dvc repro` runs, and what comes of it.

The tests share one repository and run in the order in which they stand.
"""

import hashlib

import pytest
from pipeline import MECHANISMS, Repository, copy_of_study, stages_run

pytestmark = pytest.mark.slow

DETERMINISTIC = (
    "data/prepared/*/*",
    "models/*/*/*/*",
    "metrics/cells/*/*/seed*/train/history.csv",
    "metrics/cells/*/*/seed*/evaluate/[!p]*",
    "metrics/cells/*/*/seed*/evaluate/per_class.csv",
    "metrics/cells/*/*/seed*/evaluate/predictions.csv",
    "metrics/cells/*/*/deploy/deployment.json",
    "metrics/analysis/*/fidelity/*.csv",
    "metrics/analysis/*/representations/[!p]*",
    "plots/data/curves.csv",
    "plots/data/accuracy.csv",
    "plots/data/paired.csv",
    "plots/data/confusion.csv",
    "plots/figures/*-[!th]*.png",  # the trade-off and hardware show times
    "plots/vector/*-[!th]*.svg",
)
MEASURED = {f"{stage}@digits-{name}" for stage in ("benchmark", "hardware") for name in MECHANISMS}
MEASURED |= {f"scaling@{name}" for name in MECHANISMS}
GATHERED = {"aggregate", "plot", "report"}

# Text of stages/machine.py, and what makes it the record of another machine.
A_GPU = (
    "with one_line_errors():",
    """from dataclasses import replace
from effvit import device
this_machine = device.this_machine
device.this_machine = lambda where: replace(this_machine(where), device="cuda", gpu="NVIDIA H200")
with one_line_errors():""",
)


def hashes(repository: Repository) -> dict[str, str]:
    """Digest of every deterministic file."""
    files = sorted({file for pattern in DETERMINISTIC for file in repository.path.glob(pattern) if file.is_file()})
    return {str(file.relative_to(repository.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def times(repository: Repository) -> list[bytes]:
    """What names the machine or was timed on it."""
    cell = "metrics/cells/digits/fused"
    files = "metrics/machine.json", "metrics/scaling/fused/scaling.csv", f"{cell}/hardware/hardware.json"
    return [(repository.path / file).read_bytes() for file in files]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return copy_of_study(tmp_path_factory, "reproduction")


@pytest.fixture(scope="module")
def first(repository: Repository) -> dict[str, str]:
    """Digests of what the first run made."""
    return hashes(repository)


def test_a_second_repro_looks_at_the_machine_and_has_nothing_to_do(repository: Repository) -> None:
    assert stages_run(output := repository.run("dvc repro")) == {"machine"}
    assert "as before, measured results are up to date" in output


def test_the_run_leaves_nothing_that_git_does_not_know(repository: Repository) -> None:
    assert repository.run("git status --porcelain") == ""


def test_the_summary_has_every_cell_and_numbers_alone(repository: Repository) -> None:
    summary = repository.summary()
    assert set(summary["digits"]) == set(summary["cost"]["digits"]) == set(MECHANISMS)
    assert all(0 <= top1 <= 1 for top1 in summary["digits"].values())
    for cell in summary["cost"]["digits"].values():
        assert set(cell) == {"gmacs", "latency_ratio", "memory_mib"}
        assert all(isinstance(value, int | float) for value in cell.values())


def test_only_the_code_that_changed_runs(repository: Repository) -> None:
    def after_change(file: str) -> set[str]:
        path = repository.path / file
        text = path.read_text()
        path.write_text(text + "\n# a comment\n")
        ran = stages_run(repository.run("dvc repro --dry"))
        path.write_text(text)
        return ran

    assert after_change("effvit/figures/style.py") == {"machine", "plot", "report"}
    of_linformer = after_change("effvit/attention/linformer.py")
    assert {stage for stage in of_linformer if stage.startswith("train")} == {"train@digits-linformer-0"}
    assert not [stage for stage in of_linformer if "fused" in stage]
    of_training = after_change("effvit/training/loop.py")
    assert of_training == {"machine", "train@digits-fused-0", "train@digits-linformer-0"}
    assert after_change("effvit/data/sources/folder.py") == {"machine", "prepare@digits"}


def test_times_of_another_machine_are_measured_anew_and_those_of_this_one_come_back(repository: Repository) -> None:
    """Of two stages to the end; of the others, that they are the next to run."""
    timed = {"hardware@digits-fused", "scaling@fused"}
    command = f"dvc repro {' '.join(sorted(timed))}"
    here = times(repository)
    repository.edit("stages/machine.py", *A_GPU)
    output = repository.run(command)
    assert stages_run(output) == {"machine"} | timed
    assert "gpu was none and is NVIDIA H200; measured stages run again" in output
    there = times(repository)
    assert not set(here) & set(there)
    left = stages_run(repository.run("dvc repro --dry"))
    assert {"machine", "aggregate"} | MEASURED - timed <= left <= {"machine"} | MEASURED - timed | GATHERED
    repository.edit("stages/machine.py", *reversed(A_GPU))
    assert stages_run(repository.run(command)) == {"machine"} and times(repository) == here
    repository.edit("stages/machine.py", *A_GPU)
    assert stages_run(repository.run(command)) == {"machine"} and times(repository) == there
    repository.checkout()


def test_deterministic_files_are_the_same_bytes_when_they_are_made_again(
    repository: Repository, first: dict[str, str]
) -> None:
    """All of one mechanism but what is measured, and what is made of several."""
    names = repository.run("dvc stage list --name-only").split()
    again = [name for name in names if name not in {"machine"} | MEASURED and MECHANISMS[0] not in name]
    assert len(first) > 40 and len(again) == 1 + 3 + 2 + len(GATHERED)
    assert hashes(repository) == first
    assert stages_run(repository.run(f"dvc repro --force --single-item {' '.join(again)}")) == set(again)
    assert hashes(repository) == first
