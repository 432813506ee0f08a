import json
import shutil

import dvc.api
import numpy as np
import pandas as pd
import pytest
import yaml

from effvit import ViT, ViTConfig
from effvit.errors import UserError
from effvit.measure import variants as measure
from effvit.study.variants import newest_search, runs_below, runs_of_experiments, variants_table
from stages.tables import variants as as_markdown

SIZE = {"image_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
FOCUSED = {"window_size": 2, "feature_map": "focused"}


def config(attention, value_conv=0, **options):
    return ViTConfig(**SIZE, attention=attention, attention_options=options, value_conv=value_conv)


def write_log(directory, model, accuracies, seed=0, time="2026-01-01T00:00:00+00:00", **train):
    directory.mkdir(parents=True)
    columns = dict.fromkeys(("train_loss", "val_loss", "train_accuracy"), 1.0)
    history = pd.DataFrame({"epoch": range(1, len(accuracies) + 1), "val_accuracy": accuracies}).assign(**columns)
    history.to_csv(directory / "history.csv", index=False)
    recipe = {"epochs": len(accuracies), "batch_size": 8, "lr": 1e-3, "device": "cpu"} | train
    settings = {"model": model.model_dump(), "train": recipe}
    record = {"time": time, "config": settings | {"dataset": "digits", "seed": seed}}
    (directory / "provenance.json").write_text(json.dumps(record))


def test_a_variant_has_the_mean_of_its_seeds_best_epochs_and_what_differs_from_the_defaults(tmp_path):
    write_log(tmp_path / "a-log", config("hybrid", 3, **FOCUSED), [0.5, 0.8, 0.7])
    write_log(tmp_path / "b-log", config("hybrid", 3, **FOCUSED), [0.5, 0.6, 0.6], seed=1, device="cuda")
    write_log(tmp_path / "deeper/c", config("fused"), [0.1, 0.2, 0.9])
    table = variants_table(newest_search(runs_below(tmp_path))).set_index("attention")
    assert table.index.tolist() == ["fused", "hybrid"]  # the most accurate first
    hybrid = table.loc["hybrid"]
    assert (hybrid["options"], hybrid["value_conv"], hybrid["seeds"]) == ("window_size=2 feature_map=focused", 3, "0 1")
    assert hybrid[["val_top1", "val_top1_lowest", "val_top1_highest"]].tolist() == pytest.approx([0.7, 0.6, 0.8])
    assert (hybrid["dataset"], hybrid["epochs"], hybrid["lr"]) == ("digits", 3, 1e-3)
    model = ViT(config("hybrid", 3, **FOCUSED))
    assert hybrid["macs"] == model.macs() and hybrid["parameters"] == sum(p.numel() for p in model.parameters())
    assert table.loc["fused", "options"] == ""


def test_runs_of_another_recipe_or_model_do_not_mix_and_of_the_same_the_newest_counts(tmp_path):
    write_log(tmp_path / "longer", config("linear"), [0.5] * 9)
    write_log(tmp_path / "rate", config("linear"), [0.5] * 3, lr=1e-2)
    write_log(tmp_path / "wider", config("linear").model_copy(update={"hidden_size": 16}), [0.5] * 3)
    write_log(tmp_path / "again", config("fused"), [0.7] * 3, time="2026-01-02T00:00:00+00:00")
    write_log(tmp_path / "before", config("fused"), [0.6] * 3)
    write_log(tmp_path / "window", config("window"), [0.5] * 3)
    table = variants_table(newest_search(runs_below(tmp_path)))
    assert table[["attention", "val_top1"]].to_numpy().tolist() == [["fused", 0.7], ["window", 0.5]]


def test_runs_are_those_of_all_experiments(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    for number, attention in enumerate(("fused", "window")):
        root = tmp_path / f"e{number}"
        write_log(root / f"metrics/cells/digits/{attention}/seed0/train", config(attention), [0.5])
        params = {"attention": {attention: {}}, "dataset": {"digits": {}}, "seeds": [0]}
        (root / "params.yaml").write_text(yaml.safe_dump(params))

    class Files:
        def __init__(self, repository, rev):
            self.root = tmp_path / rev

        def read_text(self, path):
            return (self.root / path).read_text()

        def get(self, source, target, recursive):
            shutil.copytree(self.root / source, target)

    rows = [{"Experiment": None, "rev": "workspace"}, *({"Experiment": f"e{i}", "rev": f"e{i}"} for i in range(2))]
    monkeypatch.setattr(dvc.api, "exp_show", lambda repository: rows)
    monkeypatch.setattr(dvc.api, "DVCFileSystem", Files)
    assert {run.config.attention for run in runs_of_experiments(tmp_path)} == {"fused", "window"}
    monkeypatch.setattr(dvc.api, "exp_show", lambda repository: rows[:1])
    with pytest.raises(UserError, match="no experiment on this commit; `make hybrid-search` runs them"):
        runs_of_experiments(tmp_path)


def test_a_directory_without_logs_and_a_log_that_is_none_are_told_in_a_line(tmp_path, effvit):
    outcome = effvit("variants", "--runs", tmp_path, "--output-dir", tmp_path / "out")
    assert outcome.code == 1 and "no history.csv below it" in outcome.err and outcome.err.count("\n") == 1
    write_log(tmp_path / "log", config("fused"), [0.5])
    (tmp_path / "log/provenance.json").write_text("{}")
    outcome = effvit("variants", "--runs", tmp_path, "--output-dir", tmp_path / "out")
    assert outcome.code == 1 and "provenance.json: expected model" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ratios_are_to_the_model_with_fused_and_the_floor_is_the_time_of_the_multiply_adds(monkeypatch):
    seconds = {"0": 4.0, "1": 2.0, "mm": 0.5, "linear": 0.25}  # of a product of 2048 x 2048 matrices: 2 * 2048³ flops

    def given(calls, **limits):
        for call in calls.values():
            call()
        return {name: np.full(6, seconds[name]) for name in calls}

    monkeypatch.setattr(measure, "interleaved", given)
    (row,) = measure.measure_variants([config("window", 3, window_size=2)], batch_size=8, budget_s=0.05)
    flops = 2 * 8 * ViT(config("window", 3, window_size=2)).macs()
    assert row["latency_ms"] == row["step_ms"] == 2000
    assert row["latency_ratio"] == row["latency_ratio_low"] == row["step_ratio_high"] == 0.5
    assert row["floor_share"] == pytest.approx(flops * 0.25 / (2 * 2048**3) / 2)
    assert row["step_floor_share"] == pytest.approx(3 * row["floor_share"])


@pytest.mark.slow
def test_the_command_writes_tables_that_become_markdown(tmp_path, effvit):
    write_log(tmp_path / "runs/a", config("hybrid", 3, **FOCUSED), [0.5])
    write_log(tmp_path / "runs/b", config("fused"), [0.25])
    write_log(tmp_path / "runs/c", config("fused"), [0.75], seed=1)
    out = tmp_path / "out"
    assert effvit("variants", "--runs", tmp_path / "runs", "--output-dir", out, "--no-measure").code == 0
    assert {file.name for file in out.iterdir()} == {"variants.csv"}
    assert (
        as_markdown(out).splitlines()[2].startswith("| `hybrid` | `window_size=2` `feature_map=focused` | 3 | 50.0% |")
    )
    assert as_markdown(out).splitlines()[2].endswith("| – | – | – |")
    assert effvit("variants", "--runs", tmp_path / "runs", "--output-dir", out, "--budget-s", "0.05").code == 0
    assert {file.name for file in out.iterdir()} == {"variants.csv", "cost.csv", "provenance.json"}
    macs = f"{ViT(config('fused')).macs() / 1e6:.2f}"
    line = as_markdown(out).splitlines()[3]
    assert line.startswith(f"| `fused` |  | 0 | 50.0% (25.0% to 75.0%) | 0, 1 | {macs} | ") and "–" not in line
