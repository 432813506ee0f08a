"""Cells on several devices and machines, by real DVC on a tiny study: in turns, at once, killed, and from a remote.

The tests share one repository and run in the order in which they stand.
"""

import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from pipeline import MECHANISMS, ROOT, Repository, copy_of_study, stages_run

pytestmark = pytest.mark.slow

NEW = [f"digits-{name}-1" for name in MECHANISMS]  # of a second seed, which has not run yet


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = copy_of_study(tmp_path_factory, "cluster")
    made.edit("conf/config.yaml", "seeds: [0]", "seeds: [0, 1]")
    made.run("python -m stages.params")
    remote = tmp_path_factory.mktemp("remote")
    made.run(f"dvc remote add --default shared {remote} && dvc push --quiet")
    made.commit("seeds")
    return made


def clone(repository: Repository, directory: Path) -> Repository:
    """Another machine's checkout."""
    repository.run(f"git clone --quiet . {directory} && git -C {directory} config user.email a@b.invalid")
    return Repository(directory)


def results(repository: Repository) -> dict[str, bytes]:
    """What training and evaluation made of the new cells, without times."""
    files = [
        Path(folder, "digits", name, "seed1", file)
        for name in MECHANISMS
        for folder, file in (("models", "model.safetensors"), ("metrics/cells", "evaluate/evaluation.json"))
    ]
    return {str(file): (repository.path / file).read_bytes() for file in files}


def objects(repository: Repository) -> dict[str, bytes]:
    """What the remote holds, by the digest under which it is there."""
    remote = repository.run("dvc config remote.shared.url").strip()
    return {path.parent.name + path.stem: path.read_bytes() for path in Path(remote, "files/md5").glob("*/*")}


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="a small file system needs `unshare -rm`, which is not allowed here",
)
def test_a_full_disk_on_one_machine_loses_its_cell_alone(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> None:
    full = clone(repository, tmp_path_factory.mktemp("full") / "effvit")
    before = objects(repository)
    small = f"mkdir models && mount -t tmpfs -o size=24k none models && dvc repro --pull train@{NEW[0]}"
    said = full.run(f"unshare -rm sh -c '{small}'", fails=True)
    assert "No space left on device (free some space and run again)" in said and "Traceback" not in said
    assert [path for path in (full.path / "models").rglob("*") if path.is_file()] == []
    full.run(f"dvc push --quiet --run-cache --with-deps train@{NEW[0]}")
    after = objects(repository)
    assert before.items() <= after.items()
    assert all(hashlib.md5(content).hexdigest() == digest for digest, content in after.items())


def test_each_machine_runs_its_cells_and_a_third_only_fetches_them(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second as a Slurm array does it, by its script with the variables set by hand."""
    first = clone(repository, tmp_path_factory.mktemp("first") / "effvit")
    cells = first.run("effvit cells").split()
    assert cells == [f"evaluate@digits-{name}-{seed}" for name in MECHANISMS for seed in (0, 1)]
    ran = first.run(f"dvc repro --pull evaluate@{NEW[0]} && dvc push --quiet --run-cache --with-deps evaluate@{NEW[0]}")
    assert stages_run(ran) == {f"train@{NEW[0]}", f"evaluate@{NEW[0]}"}
    repository.environment |= {
        "SLURM_SUBMIT_DIR": str(repository.path),
        "SLURM_ARRAY_TASK_ID": str(cells.index(f"evaluate@{NEW[1]}")),
    }
    ran = repository.run("bash stages/cells.sbatch")
    assert stages_run(ran) == {f"train@{NEW[1]}", f"evaluate@{NEW[1]}"}
    third = clone(repository, tmp_path_factory.mktemp("third") / "effvit")
    assert stages_run(third.run("dvc repro --pull evaluate")) == set()
    assert third.run("effvit cells --missing").split() == []
    repository.fetched = results(third)  # type: ignore[attr-defined]


def test_four_jobs_one_of_them_killed_end_with_the_bytes_of_those_that_ran_in_turns(repository: Repository) -> None:
    assert repository.run("effvit cells --stage train --missing").split() == [f"train@{cell}" for cell in NEW]
    environment = repository.environment
    command = ["python", "-m", "stages.jobs", "4"]
    jobs = subprocess.Popen(
        command, cwd=repository.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 600
    while not (victims := training(repository, MECHANISMS[1])):
        assert jobs.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    victims[0].kill()
    said = jobs.communicate(timeout=900)[0]
    assert jobs.returncode == 1
    assert f"{NEW[1]} failed (exit status" in said and f"[{NEW[0]}] " in said
    assert "4 of 4 cells ended, 1 failed" in said
    assert repository.run("effvit cells --missing").split() == [f"evaluate@{NEW[1]}"]
    again = repository.run("python -m stages.jobs 4")
    assert stages_run(again) == {f"train@{NEW[1]}", f"evaluate@{NEW[1]}"}
    assert results(repository) == repository.fetched  # type: ignore[attr-defined]
    assert stages_run(repository.run("dvc repro evaluate")) == set()  # dvc.lock has every cell


def training(repository: Repository, name: str) -> list[psutil.Process]:
    """The process that trains the second seed of a mechanism here, once it is there."""
    wanted = ["-m", "stages.train", "digits", name, "1"]
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:] == wanted and process.cwd() == str(repository.path):
                found.append(process)
        except psutil.Error:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("count", ["0"])
def test_a_wrong_number_of_jobs_is_named(repository: Repository, count: str) -> None:
    said = repository.run(f"python -m stages.jobs {count}", fails=True)
    assert f"error: JOBS={count}: expected a whole number of cells at a time, from 1 on" in said


def test_another_machines_lock_file_does_not_train_again_what_the_run_cache_has(repository: Repository) -> None:
    """Its model has other bytes, as rounding on another processor makes them, which are nowhere here."""
    repository.run("dvc remote remove shared")
    cell, path = f"train@digits-{MECHANISMS[0]}-0", repository.path / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    for out in lock["stages"][cell]["outs"]:
        out["md5"] = "0" * 32 + ".dir"
        shutil.rmtree(repository.path / out["path"])
    path.write_text(yaml.safe_dump(lock, sort_keys=False))
    assert stages_run(repository.run(f"dvc repro --dry --single-item {cell}")) == {cell}  # what DVC would do
    said = repository.run("python -m stages.restore")
    assert "dvc.lock: 1 stages whose results are not here" in said
    assert stages_run(repository.run(f"dvc repro --single-item {cell}")) == set()
    assert repository.run("python -m stages.restore") == ""
    assert (ROOT / "Makefile").read_text().count("python -m stages.restore") == 1
