"""The study under real DVC, in a scratch repository on a tiny recipe: a queue, `-S`, branches, what runs again.

The tests share one repository and run in the order in which they stand.
"""

import json
import re
import shutil
import time

import pytest
import yaml
from pandas import read_csv
from pipeline import MECHANISMS, ROOT, Repository, copy_of_study, stages_run

pytestmark = pytest.mark.slow

CELLS = ("prepare", "train", "evaluate", "benchmark", "deploy", "hardware", "scaling")


def of_cells(stages: set[str]) -> list[str]:
    """Those of the stages that belong to a cell, and so come back from DVC's cache."""
    return [stage for stage in stages if stage.startswith(CELLS)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return copy_of_study(tmp_path_factory, "experiments")


def test_queued_sweeps_train_each_mechanism_alone_in_checkouts_of_their_own(repository: Repository) -> None:
    before = repository.summary()
    try:
        # In one sweep over both, DVC would know the stages of the first alone.
        repository.run("dvc exp run --queue -S attention=fused -S train.epochs=2,3 train")
        repository.run("dvc exp run --queue -S attention=linformer -S train.epochs=2 train")
        repository.run("dvc exp run --queue -S attention.linformer.k=0")
        repository.run("dvc queue start")
        deadline = time.monotonic() + 1200
        while "Running" in (status := repository.run("dvc queue status")) or "Queued" in status:
            assert time.monotonic() < deadline, status
            time.sleep(5)  # looking takes a second of the processor that the queue works on
    finally:
        repository.run("dvc queue stop --kill || true")
    ended = dict(re.findall(r"^(\w{7}) .*(Success|Failed)", status, re.MULTILINE))
    said = {task: repository.run(f"dvc queue logs {task}") for task in ended}
    assert sorted(ended.values()) == ["Failed", *["Success"] * 3], f"{status}\n{said}"
    trained = []
    for ran in (stages_run(said[task]) for task, state in ended.items() if state == "Success"):
        named = {name for name in MECHANISMS for stage in ran if name in stage}
        trained += [name for name in named if named == {name} and f"train@digits-{name}-0" in ran]
    assert sorted(trained) == ["fused", "fused", "linformer"]
    assert repository.run("git status --porcelain") == "" and repository.summary() == before


def test_one_mechanism_with_another_option_runs_it_again_and_nothing_else(repository: Repository) -> None:
    """To the last stage, in a checkout of its own: where there is no more than the stages say they read."""
    repository.run("git checkout --quiet -b other")
    options = "-S attention=linformer -S attention.linformer.k=16"
    ran = stages_run(repository.run(f"dvc exp run --temp --name option {options}"))
    own = {"train@digits-linformer-0", "evaluate@digits-linformer-0", "scaling@linformer"}
    own |= {"benchmark@digits-linformer", "deploy@digits-linformer", "hardware@digits-linformer"}
    own |= {"fidelity@digits", "representations@digits", "aggregate", "plot", "report"}
    assert own <= ran <= own | {"machine"}
    repository.run("dvc exp apply option")
    summary = repository.summary()
    assert list(summary["digits"]) == list(summary["cost"]["digits"]) == ["linformer"]
    assert set(read_csv(repository.path / "plots/data/curves.csv")["attention"]) == {"linformer"}
    repository.commit("other")


def test_plots_diff_renders_pages_and_pictures_of_two_branches(repository: Repository) -> None:
    repository.run("dvc plots diff main other")
    page = (repository.path / "dvc_plots/index.html").read_text()
    entries = yaml.safe_load((repository.path / "dvc.yaml").read_text())["plots"]
    shown = [options for entry in entries if isinstance(entry, dict) for options in entry.values()]
    filled = [o["title"] for o in shown if any(len(read_csv(repository.path / file)) for file in o["y"])]
    assert filled == [options["title"] for options in shown]
    assert [title for title in filled if title not in page] == []
    for branch in ("main", "other"):
        assert f'"rev": "{branch}"' in page or f'"rev":"{branch}"' in page
        for picture in ("scaling.png", "digits-tradeoff.png"):
            assert list((repository.path / "dvc_plots/static").glob(f"{branch}*{picture}"))


def test_going_back_to_the_defaults_retrains_nothing(repository: Repository) -> None:
    """Up to the tables, of which figures and page are made."""
    assert of_cells(stages_run(repository.run("dvc exp run aggregate"))) == []
    before = repository.run("git show main:plots/data/accuracy.csv")
    assert (repository.path / "plots/data/accuracy.csv").read_text() == before


def test_going_back_to_the_committed_state_runs_nothing(repository: Repository) -> None:
    repository.checkout("main")
    assert stages_run(repository.run("dvc repro")) == {"machine"}


def test_a_wrong_option_is_one_line_and_runs_nothing(repository: Repository) -> None:
    output = repository.run("dvc exp run -S attention.linformer.k=0", fails=True)
    assert [line for line in output.splitlines() if line.startswith("error: attention.linformer.k=0")]
    assert "Traceback" not in output
    repository.checkout()


def test_a_model_starts_from_weights_of_the_study(repository: Repository) -> None:
    repository.run("dvc exp run -S model.init_from=$PWD/models/digits/fused/seed0 train@digits-linformer-0")
    report = json.loads((repository.path / "metrics/cells/digits/linformer/seed0/train/start.json").read_text())
    assert len(report["loaded"]) > 20 and all(".attn." in name for name in report["fresh"])
    output = repository.run("dvc exp run -S model.init_from=absent.pth train@digits-linformer-0", fails=True)
    assert "error: absent.pth: no such file" in output and "Traceback" not in output
    repository.checkout()


def test_make_show_is_readable_at_160_columns(repository: Repository) -> None:
    """Of the queue's runs, next to a later commit whose summary has all of the study's mechanisms."""
    makefile = (ROOT / "Makefile").read_text()
    command = re.search(r"dvc exp show .*", makefile)
    hidden = re.search(r"^HIDDEN := (.*)", makefile, re.MULTILINE)
    assert command and hidden
    repository.run("git checkout --quiet --force -b all main")
    shutil.copy(ROOT / "metrics/summary.json", repository.path / "metrics/summary.json")
    repository.commit("all")
    lines = repository.run(command[0].replace("$(HIDDEN)", hidden[1]) + " --num 2").splitlines()
    assert max(map(len, lines)) <= 160
    mechanisms = list(json.loads((ROOT / "metrics/summary.json").read_text())["digits"])
    assert len(mechanisms) == 6
    (header,) = (line.split() for line in lines if "Experiment" in line)
    assert header[:2] == ["Experiment", "State"]
    assert set(header[2:]) == {f"digits.{mechanism}" for mechanism in mechanisms}
    states = [line.split()[3] for line in lines if re.search("[├└]──", line)]
    assert sorted(state for state in states if state != "-") == ["Failed", *["Success"] * 3]
