"""The study in a scratch repository: the code as it stands here, on a tiny recipe."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[1]
MECHANISMS = ("fused", "linformer")
TRAINING = {"epochs": 1, "warmup_epochs": 0, "batch_size": 256}
MODEL = (
    "name: null\nhidden_size: 16\nnum_hidden_layers: 2\nnum_attention_heads: 2\nintermediate_size: 32\n"
    "hidden_dropout_prob: 0.0\nattention_probs_dropout_prob: 0.0\nvalue_conv: 0\ninit_from: null\n"
)
BENCHMARK = {"budget_s": 0.02, "memory_mib": 16, "batch_size": 8}
SCALING = {"budget_s": 0.02, "tokens": [65, 257]}
# With it each stage starts as a process of its own.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


class Repository:
    """A scratch repository with commands that must succeed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = os.environ | {
            "PATH": PATH if (warm := warm_python.directory()) is None else f"{warm}{os.pathsep}{PATH}",
            "DVC_SITE_CACHE_DIR": str(path.parent / "site-cache"),
            "DVC_GLOBAL_CONFIG_DIR": str(path.parent / "global-config"),
            "COLUMNS": "160",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, command: str, *, fails: bool = False) -> str:
        """Output of a shell command; it must succeed, or fail where it should."""
        done = subprocess.run(
            command, shell=True, cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=1800
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, f"{command}: exit {done.returncode}\n{output[-4000:]}"
        return output

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace text that must be there."""
        path = self.path / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new))

    def commit(self, message: str) -> None:
        """Commit all there is."""
        self.run(f"git add --all && git commit --quiet --allow-empty --message {message}")

    def checkout(self, branch: str = ".") -> None:
        """Go back to what is committed, results in DVC's cache included."""
        self.run(f"git checkout --quiet --force {branch} && dvc checkout --quiet")

    def summary(self) -> dict:
        """metrics/summary.json of the workspace."""
        return json.loads((self.path / "metrics/summary.json").read_text())


def copy_of_study(factory: pytest.TempPathFactory, name: str) -> Repository:
    """A repository of its own with the study of two mechanisms and its results, each in a commit.

    The study runs once for all processes that test side by side: the first makes it, the others wait and copy.
    """
    mine = factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    with FileLock(shared / "study.lock"):
        if not (shared / "study").exists():
            made = _scratch(factory.mktemp("made"))
            made.run("dvc repro")
            made.commit("results")
            made.path.rename(shared / "study")
    path = factory.mktemp(name) / "effvit"
    shutil.copytree(shared / "study", path, symlinks=True)
    return Repository(path)


def _scratch(directory: Path) -> Repository:
    """A repository in `directory` with one commit, of which nothing has run."""
    path = directory / "effvit"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if name.startswith(("metrics/", "plots/", "report/", "dvc.lock")) or not (ROOT / name).is_file():
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    made = Repository(path)
    made.run("git init --quiet --initial-branch main && git config user.email a@b.invalid && git config user.name a")
    recipe = path / "conf/train/quick.yaml"
    for key, value in TRAINING.items():
        recipe.write_text(re.sub(rf"^{key}:.*", f"{key}: {value}", recipe.read_text(), flags=re.MULTILINE))
    (path / "conf/model/tiny.yaml").write_text(MODEL)
    (path / "conf/attention/all.yaml").write_text(f"defaults: [{', '.join(MECHANISMS)}]\n")
    measure = path / "conf/measure/cpu.yaml"
    config = yaml.safe_load(measure.read_text())
    config["benchmark"] |= BENCHMARK
    config["scaling"] |= SCALING
    measure.write_text(f"# @package _global_\n{yaml.safe_dump(config)}")
    made.run("python -m stages.params")
    made.commit("base")
    return made


def stages_run(output: str) -> set[str]:
    """Names of the stages whose commands DVC ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))
