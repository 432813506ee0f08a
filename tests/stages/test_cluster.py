"""Cells on several devices and machines, by real DVC on a tiny study: in turns, at once, killed, and from a remote.

The tests share one repository and run in the order in which they stand.
"""

import hashlib
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from pipeline import MECHANISMS, PATH, Repository, copy_of_study, stages_run

pytestmark = pytest.mark.slow

NEW = [f"digits-{name}-1" for name in MECHANISMS]  # of a second seed, which has not run yet


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = copy_of_study(tmp_path_factory, "cluster")
    made.edit("conf/config.yaml", "seeds: [0]", "seeds: [0, 1]")
    made.run("python -m stages.params")
    remote = tmp_path_factory.mktemp("remote")  # relative to a clone, as in /net/study/effvit and /net/study/remote
    made.run(f"dvc remote add --default shared ../../{remote.name} && dvc push --quiet")
    made.commit("seeds")
    return made


@pytest.fixture(scope="module")
def third(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A machine that fetches what two others made, once they have."""
    return clone(repository, tmp_path_factory.mktemp("third") / "effvit")


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
    full.environment["PATH"] = PATH  # of processes that see the small file system
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
    repository: Repository, third: Repository, tmp_path_factory: pytest.TempPathFactory
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
    repository.edit("params.yaml", "seeds:", "seeds: ")
    assert "error: tasks clone what is committed; commit first:  M params.yaml" in script(repository)
    repository.run("git checkout --quiet params.yaml")
    repository.environment["SLURM_ARRAY_TASK_ID"] = "4"
    assert "error: task 4 of 4 cells: --array=0-3" in script(repository)
    assert stages_run(third.run("python -m stages.jobs 2")) == set()
    assert third.run("effvit cells --missing").split() == []


def script(repository: Repository) -> str:
    """What the Slurm script says where it refuses."""
    return repository.run("bash stages/cells.sbatch", fails=True)


def test_four_jobs_one_of_them_killed_end_with_the_bytes_of_those_that_ran_in_turns(
    repository: Repository, third: Repository
) -> None:
    repository.run("dvc remote default --unset")  # which has these cells
    assert "error: no default remote to keep results in" in script(repository)
    assert repository.run("effvit cells --stage train --missing").split() == [f"train@{cell}" for cell in NEW]
    environment = repository.environment | {"PATH": PATH}  # one is found by its command, and killed
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
    assert results(repository) == results(third)
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


def test_a_wrong_number_of_jobs_is_named(repository: Repository) -> None:
    said = repository.run("python -m stages.jobs 0", fails=True)
    assert "error: JOBS=0: expected a whole number of cells at a time, from 1 on" in said
    repository.edit("params.yaml", "  devices: 1", "  devices: 2")
    said = repository.run("python -m stages.jobs 2", fails=True)
    assert "error: JOBS=2: each cell has one device, but train.devices is 2" in said
    assert repository.run("python -m stages.jobs") == ""  # in turns, by the `dvc repro` that follows
    repository.edit("params.yaml", "  devices: 2", "  devices: 1")


def test_another_machines_lock_file_does_not_train_again_what_the_run_cache_has(repository: Repository) -> None:
    """Its model has other bytes, as rounding on another processor makes them, which it has not pushed.

    There is also data of the user's own that is nowhere, which is not the study's matter.
    """
    repository.run("dvc remote default shared && mkdir own && echo x > own/data && dvc add --quiet own/data")
    repository.edit("own/data.dvc", "md5: 401b", "md5: a01b")
    (repository.path / "own/data").unlink()
    cell, path = f"train@digits-{MECHANISMS[0]}-0", repository.path / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    for out in lock["stages"][cell]["outs"]:
        out["md5"] = "0" * 32 + ".dir"
        shutil.rmtree(repository.path / out["path"])
    path.write_text(yaml.safe_dump(lock, sort_keys=False))
    assert stages_run(repository.run(f"dvc repro --dry --single-item {cell}")) == {cell}  # what DVC would do
    said = repository.run("python -m stages.restore")
    assert "dvc.lock: 1 stages whose results are nowhere" in said
    assert stages_run(repository.run(f"dvc repro --pull --single-item {cell}")) == set()
    assert repository.run("python -m stages.restore") == ""


def test_files_of_dvc_that_were_cut_or_merged_are_mended_or_named(repository: Repository) -> None:
    cut = repository.path / ".dvc/tmp/rwlock"
    cut.write_text('{"write": {"/')  # as a DVC leaves it that is killed while it writes
    assert repository.run("python -m stages.restore") == "" and not cut.exists()
    path = repository.path / "dvc.lock"
    path.write_text(f"<<<<<<< HEAD\n{path.read_text()}")
    said = repository.run("python -m stages.restore", fails=True)
    assert len(said.splitlines()) == 1 and "YAML file structure is corrupted; `git checkout dvc.lock` brings" in said


def test_the_study_looks_before_dvc_runs_and_pulls_from_a_default_remote(repository: Repository) -> None:
    plan = repository.run("make --dry-run study JOBS=2")
    assert 0 < plan.index("exec python -m stages.jobs 2") < plan.index("exec dvc repro $(")
    options = re.search(r"exec dvc repro (\$\(.*\))", plan)
    assert options is not None
    assert repository.run(f"echo {options[1]}").strip() == "--pull"
    repository.run("dvc remote default --unset")
    assert repository.run(f"echo {options[1]}").strip() == ""
