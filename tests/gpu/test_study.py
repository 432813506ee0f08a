"""`make study-gpu` with small sizes: what it runs, and the tables that it writes."""

import json
import runpy
import sys
import time

import pandas as pd
import pytest

from effvit import policy
from effvit.device import this_machine
from effvit.errors import UserError
from stages import study_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture
def machine(device):
    with policy.kept():
        policy.apply(device, deterministic=True)
        return this_machine(device)


@pytest.fixture
def in_this_process(effvit, monkeypatch):
    """Run commands here, one after another, as each of their processes would."""

    def run(commands, places):
        failed = []
        for name, words in commands.items():
            if words[:3] == list(study_gpu.EFFVIT):
                if effvit(*words[3:]).code:
                    failed.append(name)
                continue
            directory, module, items = words[2], words[6], words[7:]
            assert words[:2] == ["env", "-C"] and words[5] == "-m"
            monkeypatch.chdir(directory)
            monkeypatch.setattr(sys, "argv", [module, *items])
            runpy.run_module(module, run_name="__main__")
        return failed

    return run


def test_equations_are_timed_of_what_has_kernels_in_triton(machine, tmp_path):
    parts = study_gpu.parts(study_gpu.FULL, machine, "cuda", tmp_path / "work", tmp_path, jobs=1)
    (commands,) = parts["equations"].rounds
    assert "equations performer" in commands and "equations fused" not in commands
    assert all(words[:2] == ["env", "EFFVIT_KERNELS=reference"] for words in commands.values())
    (plain,) = parts["blocks"].rounds
    assert len(plain) == len(study_gpu.FULL.mechanisms) and "env" not in plain["blocks fused"]


def test_every_part_writes_its_table(machine, device, tmp_path, in_this_process):
    results = tmp_path / "machines"
    parts = study_gpu.parts(study_gpu.DRY, machine, device.type, tmp_path / "work", results, jobs=1)
    folder = results / study_gpu.folder_of(machine)
    became = study_gpu.run_parts(parts, machine, folder, in_this_process)
    assert [part["failed"] for part in became.values()] == [[], [], []]
    blocks, models, cells = (pd.read_csv(folder / f"{name}.csv") for name in ("blocks", "models", "cells"))
    assert set(blocks["attention"]) == {"linear"} and set(blocks["scope"]) == {"block", "model"}
    assert {"input", "step", "loop"} <= set(models["what"]) and (models["model"] == "tiny").all()
    assert cells[["dataset", "attention", "seed", "epochs"]].values.tolist() == [["digits", "uniform", 0, 1]]
    assert set(blocks["torch"]) | set(cells["torch"]) == {machine.torch}
    (fastest,) = results.glob("*.csv")
    assert set(pd.read_csv(fastest)["attention"]) == {"fused", "linear"}
    assert json.loads((folder / "study.json").read_text())["machine"]["device"] == device.type


def test_on_a_gpu_it_is_every_mechanism_on_both_widths(machine, tmp_path):
    parts = study_gpu.parts(study_gpu.FULL, machine, "cuda", tmp_path, tmp_path, jobs=4)
    assert sum(part.minutes for part in parts.values()) <= 20
    (blocks,) = parts["blocks"].rounds
    assert len(blocks) == 12 and all("384x6,192x3" in words for words in blocks.values())
    prepare, *rounds = parts["cells"].rounds
    assert len(prepare) == 1 and parts["cells"].at_once == 4
    # What is trained is evaluated before the next begin: 36 trainings may take longer than there is time.
    assert [len(commands) for commands in rounds] == [4] * 18
    for train, evaluate in zip(rounds[::2], rounds[1::2], strict=True):
        assert list(train) == list(evaluate)
        assert all("stages.train" in words for words in train.values())
        assert all("stages.evaluate" in words for words in evaluate.values())
    assert len({name for commands in rounds for name in commands}) == 36


@pytest.mark.parametrize("jobs", ["0", "-3"])
def test_fewer_than_one_training_at_a_time_is_refused_before_anything_runs(jobs, tmp_path, monkeypatch):
    command = ["study_gpu", "--device", "cpu", "--jobs", jobs, "--output-dir", tmp_path, "--work-dir", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(UserError, match=f"^--jobs {jobs}: expected at least 1 training at a time$"):
        study_gpu.main()
    assert list(tmp_path.iterdir()) == []


def test_a_part_without_time_left_says_so_and_the_next_one_runs(machine, tmp_path):
    slow = study_gpu.Part(0.001, [{"slow": []}], pd.DataFrame)
    quick = study_gpu.Part(1, [{"quick": []}], lambda: pd.DataFrame({"a": [1]}))
    ran = []

    def run(commands, places):
        ran.extend(commands)
        if "slow" in commands:
            time.sleep(60)
        return []

    became = study_gpu.run_parts({"slow": slow, "quick": quick}, machine, tmp_path, run)
    assert ran == ["slow", "quick"]
    assert [part["in_time"] for part in became.values()] == [False, True]
    assert [path.name for path in tmp_path.glob("*.csv")] == ["quick.csv"]
