import json
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_FLAGS
from PIL import Image
from safetensors.torch import save_file

from effvit.measure.macs import count_macs
from effvit.model.checkpoint import load_model

pytestmark = pytest.mark.slow

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
from effvit.cli.app import main
main()
"""


@pytest.fixture
def train(effvit, digits_dir):
    def run(*arguments):
        return effvit("train", "--dataset-dir", digits_dir, "--output-dir", "run", *TINY_FLAGS, *arguments)

    return run


def visible(directory):
    return sorted(path.name for path in directory.iterdir())


def test_it_trains_what_it_was_told_to(train, tmp_path):
    arguments = ["--attention", "linformer", "-o", "k=4", "-o", "share=kv", "--epochs", 1, "--horizontal-flip"]
    outcome = train(*arguments, "--log-dir", "log", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "epoch   1/1" in outcome.err
    assert visible(tmp_path) == ["log", "run"]
    config = load_model(tmp_path / "run").config
    assert config.attention == "linformer" and config.attention_options == {"k": 4, "share": "kv"}
    assert (config.hidden_size, config.image_size, config.num_classes) == (16, 16, 10)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("attention", ["fused", "hybrid"])
def test_a_model_has_the_prefix_tokens_it_was_told_to_and_serves_as_others_do(
    train, effvit, digits_dir, tmp_path, tokens, attention
):
    options = ["-o", "window_size=2"] if attention == "hybrid" else []
    arguments = ["--attention", attention, *options, "--prefix-tokens", tokens, "--epochs", 1, "--device", "cpu"]
    outcome = train(*arguments)
    assert outcome.code == 0, outcome.err
    model = load_model(tmp_path / "run")
    assert (model.cls_token is None) == (tokens == 0) and model.pos_embed.shape[1] == tokens + 16
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "image.png")
    place = ["--model-dir", "run", "--device", "cpu"]
    for command in (
        ["evaluate", "--dataset-dir", digits_dir, "--output-dir", "scores"],
        ["predict", "image.png"],
        ["attention-map", "image.png", "--output", "map.png"],
    ):
        assert (outcome := effvit(*command, *place)).code == 0, outcome.err


def test_one_line_an_epoch_in_a_log(train):
    outcome = train("--epochs", 2, "--device", "cpu")
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(lines) == 2 and all(line.endswith("images/s") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--attention", "lineformer"], ["--attention 'lineformer'", "linformer", "hybrid"]),
        (["--attention", "../fused"], ["--attention '../fused'"]),
        (["--num-attention-heads", 3], ["--num-attention-heads 3", "--hidden-size 16"]),
        (["--num-attention-heads", 0], ["--num-attention-heads 0"]),
        (["--patch-size", 5], ["--patch-size 5", "image_size=16"]),
        (["--patch-size", 0], ["--patch-size 0"]),
        (["--hidden-size", -16], ["--hidden-size -16"]),
        (["--hidden-dropout-prob", 1], ["--hidden-dropout-prob 1"]),
        (["--attention", "linformer", "-o", "k=0"], ["--option k=0"]),
        (["--attention", "linformer", "-o", "k=-1"], ["--option k=-1"]),
        (["--attention", "linformer", "-o", "k=18"], ["--option k=18", "17"]),
        (["--attention", "linformer", "-o", "k=1.5"], ["--option k=1.5", "integer"]),
        (["--attention", "linformer", "-o", "k=many"], ["--option k='many'", "integer"]),
        (["--attention", "linformer", "-o", "k="], ["--option k=None", "integer"]),
        (["--attention", "linformer", "-o", "m=3"], ["--option m: ", "unknown option"]),
        (["--attention", "linformer", "-o", "k"], ["--option k: ", "KEY=VALUE"]),
        (["--attention", "linformer", "-o", "k=[1"], ["--option k=[1"]),
        (["--attention", "linformer", "-o", "k=1", "-o", "k=2"], ["--option k=2", "k is given twice"]),
        (["--hidden-size", 4 * 10**9], ["--hidden-size 4000000000", "65536"]),
        (["--crop-padding", 16], ["--crop-padding 16", "image_size=16"]),
        (["--batch-size", 10**26], ["--batch-size 1"]),
        (["--attention", "performer", "-o", "num_features=0"], ["--option num_features=0"]),
        (["--attention", "performer", "-o", "num_features=2.5"], ["--option num_features=2.5"]),
        (["--attention", "nystromformer", "-o", "num_landmarks=-4"], ["--option num_landmarks=-4"]),
        (["--attention", "nystromformer", "-o", "num_landmarks=0"], ["--option num_landmarks=0"]),
        (["--attention", "hybrid", "-o", "window_size=5"], ["--option window_size=5", "4"]),
        (["-o", "k=4"], ["--option k: ", "unknown option"]),
        (["--epochs", 0], ["--epochs 0"]),
        (["--epochs", -3], ["--epochs -3"]),
        (["--batch-size", 0], ["--batch-size 0"]),
        (["--lr", 0], ["--lr 0"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", "inf"], ["--lr inf"]),
        (["--clip-norm", "inf"], ["--clip-norm inf"]),
        (["--save-every", -1], ["--save-every -1"]),
        (["--timm", ""], ["--timm '': expected the name"]),
        (
            ["--timm", "vit_tiny_patch16_224", "--model", "tiny"],
            ["--model tiny --timm vit_tiny"],
        ),
        (["--prefix-tokens", -1], ["--prefix-tokens -1"]),
        (["--dataset-dir", "nowhere"], ["nowhere", "effvit prepare"]),
        (["--output-dir", "."], ["replaced as a whole"]),
        (["--log-dir", "run"], ["run", "replaced as a whole"]),
        (["--log-dir", "run/log"], ["run", "replaced as a whole"]),
        (["--output-dir", "log/run", "--log-dir", "log"], ["log", "replaced as a whole"]),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(train, tmp_path, arguments, parts):
    outcome = train(*arguments)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    for part in parts:
        assert part in outcome.err
    assert visible(tmp_path) == []


def test_a_warm_up_as_long_as_the_run_is_shortened_and_the_one_used_is_recorded(train, tmp_path):
    outcome = train("--epochs", 1, "--warmup-epochs", 2, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "warmup_epochs=2 is not less than epochs=1: warm-up shortened to 0.1 epochs" in outcome.err
    record = json.loads((tmp_path / "run-log" / "provenance.json").read_text())["config"]["train"]
    assert record["warmup_epochs"] == 0.1 and "logger" not in record


def test_it_ends_with_what_the_run_came_to_and_a_finished_run_is_not_repeated(train, tmp_path):
    arguments = ["--epochs", 2, "--device", "cpu"]
    outcome = train(*arguments)
    block = dict(re.split(r"\s{2,}", line) for line in outcome.out.splitlines())
    history = pd.read_csv(tmp_path / "run-log" / "history.csv")
    timing = pd.read_csv(tmp_path / "run-log" / "timing.csv")
    model = load_model(tmp_path / "run")
    best = history["val_accuracy"].idxmax()
    assert block["best epoch"] == f"{best + 1} of 2"
    assert block["validation accuracy"] == f"{history['val_accuracy'][best]:.2%}"
    assert block["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert block["MACs per image"] == f"{count_macs(model, torch.empty(1, 3, 16, 16)):,}"
    assert block["device"] == "cpu" and block["model"] == "run" and block["log"] == "run-log"
    assert float(block["training time"].removesuffix(" s")) == pytest.approx(timing["seconds"].sum(), abs=0.06)

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = train(*arguments)
    assert again.code == 0 and again.out == "" and "run: already trained with these settings" in again.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert "epoch   2/2" in train(*arguments, "--overwrite").err
    assert "epoch   1/1" in train("--epochs", 1, "--device", "cpu").err, "other settings"
    shutil.rmtree(tmp_path / "run")
    assert "epoch   1/1" in train("--epochs", 1, "--device", "cpu").err, "its model is gone"


def test_many_tokens_are_remarked_before_training(effvit, digits_dir, tmp_path):
    large = tmp_path / "large"
    assert effvit("prepare", "--dataset", "digits", "--image-size", 34, "--output-dir", large).code == 0
    flags = [*TINY_FLAGS, "--patch-size", 1, "--device", "cpu", "--lr", "1e30", "--epochs", 1]
    outcome = effvit("train", "--dataset-dir", large, "--output-dir", "run", *flags, "--batch-size", 4)
    first = outcome.err.splitlines()[0]
    assert first.startswith("1,157 tokens per image") and "square" in first and "34 times" in first
    small = effvit("train", "--dataset-dir", digits_dir, "--output-dir", "run", *flags, "--patch-size", 4)
    assert "tokens per image" not in small.err


def test_device_that_is_not_there_ends_in_one_line(train, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    outcome = train("--device", "cuda")
    assert outcome.code == 1 and outcome.err.strip().startswith("error: --device cuda")
    assert visible(tmp_path) == []


def test_divergence_ends_in_one_line(train, tmp_path):
    outcome = train("--lr", "1e30", "--epochs", 1, "--device", "cpu")
    (line,) = [line for line in outcome.err.splitlines() if line]
    assert outcome.code == 1 and line.startswith("error: loss became nan at epoch 1, step 2 of")
    assert visible(tmp_path) == []


def test_dataset_is_not_replaced_by_the_model(effvit, digits_dir, tmp_path):
    outcome = effvit("train", "--dataset-dir", digits_dir, "--output-dir", digits_dir, *TINY_FLAGS)
    assert outcome.code == 1 and (digits_dir / "meta.json").exists()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_model_that_cannot_be_written_whole_is_not_written(digits_dir, tmp_path):
    arguments = ["train", "--dataset-dir", digits_dir, "--output-dir", "run", *TINY_FLAGS, "--epochs", "1"]
    command = [sys.executable, "-c", LIMITED, *map(str, arguments), "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and "File too large" in last and "run" in last
    assert "Traceback" not in result.stderr and visible(tmp_path) == []


@pytest.mark.parametrize("full", ["run", "log"])
def test_full_disk_ends_in_one_line_and_leaves_nothing(train, tmp_path, full):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for neither the model (some 20 KB) nor, in the other case, for the log.
    size = "size=12k" if full == "run" else "size=4k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        place = ["--output-dir", disk / "run", "--log-dir", "log"] if full == "run" else ["--log-dir", disk / "log"]
        outcome = train(*place, "--epochs", 1, "--device", "cpu")
        last = outcome.err.splitlines()[-1]
        assert outcome.code == 1 and last.startswith("error: ") and "No space left on device" in last
        assert visible(disk) == [] and visible(tmp_path) == ["disk"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_it_starts_from_trained_weights_and_logs_what_became_of_each(train, trained, tmp_path):
    still = ["--epochs", 1, "--lr", 1e-12, "--weight-decay", 0, "--device", "cpu"]
    outcome = train("--init-from", trained / "run", "--attention", "performer", "--log-dir", "log", *still)
    assert outcome.code == 0, outcome.err
    assert "start from" in outcome.err and "fresh: blocks.*.attn.omega" in outcome.err
    source, model = load_model(trained / "run").state_dict(), load_model(tmp_path / "run").state_dict()
    assert all((model[name] - tensor).abs().max() < 1e-6 for name, tensor in source.items())
    report = json.loads((tmp_path / "log" / "start.json").read_text())
    assert sorted(report["loaded"]) == sorted(source)
    assert report["fresh"] == [f"blocks.{i}.attn.omega" for i in range(2)]
    record = json.loads((tmp_path / "log" / "provenance.json").read_text())["config"]["start"]
    assert record == {"from": str(trained / "run"), "sha256": report["sha256"]}


@pytest.mark.parametrize(
    ("weights", "parts"),
    [("nowhere.pth", ["nowhere.pth: no such file"]), ("run", ["hidden_size=16, here 32"])],
)
def test_weights_that_cannot_be_a_start_are_one_line_and_leave_nothing(train, trained, tmp_path, weights, parts):
    outcome = train("--init-from", trained / weights, "--hidden-size", 32, "--epochs", 1, "--device", "cpu")
    assert outcome.code == 1 and len(outcome.err.strip().splitlines()) == 1
    assert all(part in outcome.err for part in parts)
    assert visible(tmp_path) == []


def test_weights_that_the_output_would_replace_are_refused(train, trained):
    outcome = train("--init-from", trained / "run", "--output-dir", trained / "run", "--device", "cpu")
    assert outcome.code == 1 and "is replaced as a whole" in outcome.err


def test_a_model_of_timms_is_fine_tuned_with_another_mechanism_and_says_both_accuracies(effvit, digits_dir, tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=10)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    flags = ("--dataset-dir", digits_dir, "--epochs", 1, "--batch-size", 256, "--lr", 1e-4, "--device", "cpu")
    flags += ("--timm", "vit_tiny_patch16_224", "--init-from", tmp_path / "theirs.safetensors")
    outcome = effvit("train", *flags, "--attention", "performer", "--output-dir", "run", "--log-dir", "log")
    assert outcome.code == 0, outcome.err
    start = json.loads((tmp_path / "log/start.json").read_text())
    assert all("omega" in name for name in start["fresh"]) and 0 <= start["val_accuracy_before"] <= 1
    assert f"validation accuracy before training: {start['val_accuracy_before']:.1%}" in outcome.err
    history = pd.read_csv(tmp_path / "log/history.csv")
    assert len(history) == 1 and history["val_accuracy"][0] > start["val_accuracy_before"]
    assert load_model(tmp_path / "run").config.hidden_size == 192
