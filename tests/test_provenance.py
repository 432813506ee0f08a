import json
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from effvit import provenance
from effvit.device import this_machine
from effvit.provenance import version_of, write_provenance

MACHINE = this_machine(torch.device("cpu"))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "effvit").mkdir()
    for name in ("effvit/code.py", "dvc.lock"):
        (tmp_path / name).write_text("first\n")
    for command in (
        ("init", "-q"),
        ("add", "."),
        ("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first"),
    ):
        subprocess.run(("git", *command), check=True)
    return tmp_path


def revision(directory):
    return written(directory)["git_revision"]


def written(directory, machine=MACHINE):
    write_provenance(directory, {"batch_size": 3}, machine)
    return json.loads((directory / "provenance.json").read_text())


def test_a_revision_is_dirty_where_code_differs_from_it_and_not_where_dvc_has_written(repository):
    head = subprocess.run(("git", "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout
    (repository / "dvc.lock").write_text("second\n")
    assert revision(repository) == head[:12]
    (repository / "effvit" / "code.py").write_text("second\n")
    assert revision(repository) == head[:12] + "-dirty"


def test_outside_a_repository_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision(tmp_path) is None


def test_a_result_names_the_machine_that_it_is_given(tmp_path):
    machine = replace(MACHINE, threads=7)
    record = written(tmp_path, machine)
    assert record["machine"] == asdict(machine)
    assert record["config"] == {"batch_size": 3}


def test_a_package_that_is_not_installed_has_an_unknown_version(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package"))
    assert written(tmp_path)["packages"] == {"torch": version_of("torch"), "no-such-package": "unknown"}
    assert torch.__version__.startswith(version_of("torch"))
