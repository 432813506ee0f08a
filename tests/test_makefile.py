import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


def commands(directory, *arguments):
    """What `make env` would do in a checkout without an environment, or with one of this PyTorch."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    made = subprocess.run(("make", "-n", "env", *arguments), cwd=directory, capture_output=True, text=True, check=True)
    return made.stdout.splitlines()


def test_the_environment_is_the_locks(tmp_path):
    (install,) = (line for line in commands(tmp_path) if "--requirement" in line)
    assert install.endswith("--requirement requirements.lock") and "index-url" not in install


def test_another_pytorch_is_of_the_locks_version_and_comes_without_the_locks_cuda(tmp_path):
    of_torch, rest = (line for line in commands(tmp_path, "TORCH=cpu") if "--requirement" in line)
    assert "--index-url https://download.pytorch.org/whl/cpu" in of_torch and "index-url" not in rest
    chosen, others = (
        subprocess.run(line.partition(" | ")[0], shell=True, cwd=tmp_path, capture_output=True, text=True).stdout
        for line in (of_torch, rest)
    )
    assert [line.partition("==")[0] for line in chosen.splitlines()] == ["torch", "torchvision"]
    left_out = [line for line in LOCK if line not in others.splitlines() and line not in chosen.splitlines()]
    assert left_out and all(re.match(r"(nvidia-|cuda-|triton==)", line) for line in left_out)
    assert not re.search(r"^(nvidia|cuda|triton|torch=|torchvision)", others, re.MULTILINE)


@pytest.mark.parametrize(
    ("there", "asked", "again"), [("cpu", "TORCH=cpu", False), ("cpu", "TORCH=cu126", True), ("cpu", "", False)]
)
def test_an_environment_is_made_again_for_another_pytorch_alone(tmp_path, there, asked, again):
    commands(tmp_path)  # the files, older than the environment
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.made").write_text(f"{there}\n")
    made = subprocess.run(("make", "-n", "env", *filter(None, [asked])), cwd=tmp_path, capture_output=True, text=True)
    assert ("pip install" in made.stdout) == again
