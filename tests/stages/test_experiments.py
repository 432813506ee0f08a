"""The study under real DVC: in a scratch repository, on a tiny recipe, with the three uses that must always work.

The tests share one repository and run in the order in which they stand.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pandas import read_csv

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DETERMINISTIC = (
    "data/prepared/*/*",
    "models/*/*/*/*",
    "metrics/cells/*/*/seed*/train/history.csv",
    "metrics/cells/*/*/seed*/evaluate/[!p]*",
    "metrics/cells/*/*/seed*/evaluate/per_class.csv",
    "metrics/cells/*/*/seed*/evaluate/predictions.csv",
    "metrics/cells/*/*/benchmark/model.json",
    "metrics/cells/*/*/deploy/deployment.json",
    "metrics/scaling/*/macs.csv",
    "metrics/analysis/*/fidelity/*.csv",
    "metrics/analysis/*/representations/[!p]*",
    "plots/data/curves.csv",
    "plots/data/accuracy.csv",
    "plots/data/paired.csv",
    "plots/data/confusion.csv",
    "plots/figures/*-[!th]*.png",  # the trade-off and hardware show times
    "plots/vector/*-[!th]*.svg",
)


# Text of stages/machine.py, and what makes it the record of another machine.
A_GPU = (
    "with one_line_errors():",
    """from dataclasses import replace
from effvit import device
this_machine = device.this_machine
device.this_machine = lambda where: replace(this_machine(where), device="cuda", gpu="NVIDIA H200")
with one_line_errors():""",
)


class Repository:
    """A scratch repository with commands that must succeed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
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

    def summary(self) -> dict:
        """metrics/summary.json of the workspace."""
        return json.loads((self.path / "metrics/summary.json").read_text())

    def hashes(self) -> dict[str, str]:
        """Digest of every deterministic file."""
        files = sorted({file for pattern in DETERMINISTIC for file in self.path.glob(pattern) if file.is_file()})
        return {str(file.relative_to(self.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stages_run(output: str) -> set[str]:
    """Names of the stages whose commands DVC ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    path = tmp_path_factory.mktemp("study") / "effvit"
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
    for key, value in {"epochs": 1, "warmup_epochs": 0, "batch_size": 256}.items():
        text = (path / "conf/train/quick.yaml").read_text()
        (path / "conf/train/quick.yaml").write_text(re.sub(rf"^{key}:.*", f"{key}: {value}", text, flags=re.MULTILINE))
    (path / "conf/model/tiny.yaml").write_text(
        "name: null\nhidden_size: 16\nnum_hidden_layers: 2\nnum_attention_heads: 2\nintermediate_size: 32\n"
        "hidden_dropout_prob: 0.0\nattention_probs_dropout_prob: 0.0\ninit_from: null\n"
    )
    (path / "conf/attention/all.yaml").write_text("defaults: [fused, linformer]\n")
    config = yaml.safe_load((path / "conf/config.yaml").read_text())
    config["benchmark"] |= {"budget_s": 0.02, "memory_mib": 16, "batch_size": 8}
    config["scaling"] |= {"budget_s": 0.02, "tokens": [65, 257]}
    (path / "conf/config.yaml").write_text(yaml.safe_dump(config))
    made.run("python -m stages.params")
    made.commit("base")
    made.run("dvc repro")
    made.commit("results")
    return made


def test_a_second_repro_looks_at_the_machine_and_has_nothing_to_do(repository: Repository) -> None:
    assert stages_run(output := repository.run("dvc repro")) == {"machine"}
    assert "as before, measured results are up to date" in output


def test_the_run_leaves_nothing_that_git_does_not_know(repository: Repository) -> None:
    assert repository.run("git status --porcelain") == ""


def test_the_summary_has_every_cell_and_numbers_alone(repository: Repository) -> None:
    summary = repository.summary()
    assert set(summary["digits"]) == set(summary["cost"]["digits"]) == {"fused", "linformer"}
    assert all(0 <= top1 <= 1 for top1 in summary["digits"].values())
    for cell in summary["cost"]["digits"].values():
        assert set(cell) == {"gmacs", "latency_ratio", "memory_mib"}
        assert all(isinstance(value, int | float) for value in cell.values())


def test_deterministic_files_are_the_same_bytes_when_all_runs_again(repository: Repository) -> None:
    before = repository.hashes()
    assert len(before) > 40
    assert len(stages_run(repository.run("dvc repro --force"))) == 2 + 2 * 6 + 2 + 3
    assert repository.hashes() == before
    repository.commit("again")


def test_times_of_another_machine_are_measured_anew_and_those_of_this_one_come_back(repository: Repository) -> None:
    files = (
        "metrics/machine.json",
        "metrics/scaling/fused/scaling.csv",
        "metrics/cells/digits/fused/benchmark/cost.csv",
    )

    def repro() -> tuple[str, list[bytes]]:
        output = repository.run("dvc repro benchmark@digits-fused scaling@fused evaluate@digits-fused-0")
        return output, [(repository.path / file).read_bytes() for file in files]

    here = [(repository.path / file).read_bytes() for file in files]
    repository.edit("stages/machine.py", *A_GPU)
    output, there = repro()
    assert stages_run(output) == {"machine", "benchmark@digits-fused", "scaling@fused"}
    assert "gpu was none and is NVIDIA H200; measured stages run again" in output
    assert not set(here) & set(there)
    repository.edit("stages/machine.py", *reversed(A_GPU))
    output, results = repro()
    assert stages_run(output) == {"machine"} and results == here
    repository.edit("stages/machine.py", *A_GPU)
    output, results = repro()
    assert stages_run(output) == {"machine"} and results == there
    repository.run("git checkout --quiet . && dvc checkout --quiet")


def test_one_mechanism_trains_alone_and_the_summary_names_no_other(repository: Repository) -> None:
    ran = stages_run(repository.run("dvc exp run -S attention=linformer -S train.epochs=2"))
    assert "train@digits-linformer-0" in ran
    assert not [stage for stage in ran if "fused" in stage]
    assert set(repository.summary()["digits"]) == {"linformer"}
    assert "fused" not in (repository.path / "plots/data/curves.csv").read_text()


def test_one_option_runs_its_mechanism_again_and_nothing_else(repository: Repository) -> None:
    ran = stages_run(repository.run("dvc exp run -S attention.linformer.k=16"))
    own = {"train@digits-linformer-0", "evaluate@digits-linformer-0", "scaling@linformer"}
    own |= {"benchmark@digits-linformer", "deploy@digits-linformer", "hardware@digits-linformer"}
    own |= {"fidelity@digits", "representations@digits"}
    assert own <= ran <= own | {"machine", "aggregate", "plot", "report"}


def test_going_back_to_the_defaults_retrains_nothing(repository: Repository) -> None:
    before = repository.run("git show HEAD:plots/data/accuracy.csv")
    ran = stages_run(repository.run("dvc exp run"))
    assert not [stage for stage in ran if stage.startswith(("prepare", "train", "evaluate", "benchmark", "scaling"))]
    assert (repository.path / "plots/data/accuracy.csv").read_text() == before


def test_going_back_to_the_committed_state_retrains_nothing(repository: Repository) -> None:
    repository.run("git checkout --quiet --force main && dvc checkout --quiet")
    ran = stages_run(repository.run("dvc repro"))
    assert not [stage for stage in ran if stage.startswith(("prepare", "train", "evaluate", "benchmark", "scaling"))]


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


def test_a_wrong_option_is_one_line_and_runs_nothing(repository: Repository) -> None:
    output = repository.run("dvc exp run -S attention.linformer.k=0", fails=True)
    assert [line for line in output.splitlines() if line.startswith("error: attention.linformer.k=0")]
    assert "Traceback" not in output
    repository.run("git checkout --quiet --force main && dvc checkout --quiet")


def test_plots_diff_renders_pages_and_pictures_of_two_branches(repository: Repository) -> None:
    repository.run("git checkout --quiet -b other")
    repository.run("dvc exp run -S 'attention=[fused,linformer]' -S attention.linformer.k=16")
    repository.commit("other")
    repository.run("dvc plots diff main other")
    page = (repository.path / "dvc_plots/index.html").read_text()
    entries = yaml.safe_load((repository.path / "dvc.yaml").read_text())["plots"]
    shown = [options for entry in entries if isinstance(entry, dict) for options in entry.values()]
    filled = [o["title"] for o in shown if any(len(read_csv(repository.path / file)) for file in o["y"])]
    assert len(filled) == len(shown) - 1  # without the hybrid there are no gates
    assert [title for title in filled if title not in page] == []
    for branch in ("main", "other"):
        assert f'"rev": "{branch}"' in page or f'"rev":"{branch}"' in page
        for picture in ("scaling.png", "digits-tradeoff.png"):
            assert list((repository.path / "dvc_plots/static").glob(f"{branch}*{picture}"))


def test_a_model_starts_from_weights_of_the_study(repository: Repository) -> None:
    repository.run("dvc exp run -S model.init_from=$PWD/models/digits/fused/seed0 train@digits-linformer-0")
    report = json.loads((repository.path / "metrics/cells/digits/linformer/seed0/train/start.json").read_text())
    assert len(report["loaded"]) > 20 and all(".attn." in name for name in report["fresh"])
    output = repository.run("dvc exp run -S model.init_from=absent.pth train@digits-linformer-0", fails=True)
    assert "error: absent.pth: no such file" in output and "Traceback" not in output
    repository.run("git checkout --quiet . && dvc checkout --quiet")


def test_a_queued_sweep_runs_in_checkouts_of_its_own(repository: Repository) -> None:
    repository.run("git checkout --quiet --force main && dvc checkout --quiet")
    known = set(repository.run("git for-each-ref --format='%(refname)' refs/exps").split())
    try:
        repository.run("dvc exp run --queue -S attention=linformer,fused")
        repository.run("dvc exp run --queue -S attention.linformer.k=0")
        repository.run("dvc queue start")
        deadline = time.monotonic() + 1200
        while "Running" in (status := repository.run("dvc queue status")) or "Queued" in status:
            assert time.monotonic() < deadline, status
            time.sleep(2)
        assert (status.count("Success"), status.count("Failed")) == (2, 1), status
    finally:
        repository.run("dvc queue stop --kill || true")
    refs = set(repository.run("git for-each-ref --format='%(refname)' refs/exps").split()) - known
    summaries = [
        json.loads(repository.run(f"git show {ref}:metrics/summary.json")) for ref in refs if "/celery/" not in ref
    ]
    assert sorted(list(summary["digits"]) for summary in summaries) == [["fused"], ["linformer"]]


def test_make_show_is_readable_at_160_columns(repository: Repository) -> None:
    """Of the queue's runs, before and after a commit whose summary has six mechanisms."""
    makefile = (ROOT / "Makefile").read_text()
    command = re.search(r"dvc exp show .*", makefile)
    hidden = re.search(r"^HIDDEN := (.*)", makefile, re.MULTILINE)
    assert command and hidden
    shutil.copy(ROOT / "metrics/summary.json", repository.path / "metrics/summary.json")
    repository.commit("six")
    lines = repository.run(command[0].replace("$(HIDDEN)", hidden[1]) + " --num 2").splitlines()
    assert max(map(len, lines)) <= 160
    mechanisms = list(json.loads((ROOT / "metrics/summary.json").read_text())["digits"])
    assert len(mechanisms) == 6
    (header,) = (line.split() for line in lines if "Experiment" in line)
    assert header[:2] == ["Experiment", "State"]
    assert set(header[2:]) == {f"digits.{mechanism}" for mechanism in mechanisms}
    states = [line.split()[3] for line in lines if re.search("[├└]──", line)]
    assert sorted(state for state in states if state != "-") == ["Failed", "Success", "Success"]
