import json
import subprocess

import pytest

from effvit.provenance import write_provenance


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
    write_provenance(directory, {})
    return json.loads((directory / "provenance.json").read_text())["git_revision"]


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
