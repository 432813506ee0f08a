import json
import math
from importlib.util import find_spec

import pandas as pd
import pytest
import torch

from effvit import ViT
from effvit.errors import UserError
from effvit.measure import throughput
from effvit.measure.throughput import first_images, measure_throughput, print_throughput, timm_model
from effvit.training.recipe import TrainConfig

RECIPE = TrainConfig(epochs=1, batch_size=16, lr=1e-3, clip_norm=1.0, crop_padding=2, device="cpu")
PARTS = ["input", "step", "timm", "loop"] if find_spec("timm") else ["input", "step", "loop"]


@pytest.fixture(scope="module")
def rows(digits, tiny_config):
    return measure_throughput(
        tiny_config(),
        digits,
        RECIPE,
        horizontal_flip=True,
        peer="timm" in PARTS,
        budget_s=0.01,
        device=torch.device("cpu"),
    )


def test_every_part_has_its_speed_relative_to_the_step(rows):
    assert [row["what"] for row in rows] == PARTS
    for row in rows:
        assert row["n"] >= 3 and 0 < row["q25_ms"] <= row["median_ms"] <= row["q75_ms"]
        assert row["images_per_second"] == pytest.approx(16 / row["median_ms"] * 1e3)
    assert next(row["speed"] for row in rows if row["what"] == "step") == 1


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_steps_run_in_the_precision_of_the_recipe(digits, tiny_config, monkeypatch, precision, dtype):
    seen = []

    def hooked(build):
        def built(*args):
            model = build(*args)
            model.head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
            return model

        return built

    monkeypatch.setattr(throughput, "ViT", hooked(ViT))
    monkeypatch.setattr(throughput, "timm_model", hooked(timm_model))
    monkeypatch.setattr(throughput, "_loop", lambda *args: lambda: 1e-3)  # steps of the training loop itself
    recipe = RECIPE.model_copy(update={"precision": precision})
    options = {"horizontal_flip": False, "peer": "timm" in PARTS, "budget_s": 0.01, "device": torch.device("cpu")}
    measure_throughput(tiny_config(), digits, recipe, **options)
    assert set(seen) == {dtype}


def test_what_is_printed_follows_from_the_rows(capsys):
    row = {"images_per_second": 1000.0, "median_ms": 1.0, "n": 7}
    speeds = {"input": (12.0, 11.0, 13.0), "step": (1.0, 1.0, 1.0), "timm": (0.8, 0.5, 1.25), "loop": (0.95, 0.9, 1.02)}
    keys = ("speed", "speed_low", "speed_high")
    print_throughput([row | {"what": what} | dict(zip(keys, speeds[what], strict=True)) for what in PARTS])
    said = " ".join(capsys.readouterr().out.split())
    assert "delivers 12.0 (11.0 to 13.0) times what the step takes" in said
    assert "5.0% (-2.0% to 10.0%) of a step of the loop" in said
    if "timm" in PARTS:
        assert "1.25 (0.80 to 2.00) times timm's images/s" in said


def test_an_interval_needs_samples(capsys, rows):
    few, enough = {"speed_low": math.nan, "speed_high": math.nan}, {"speed_low": 0.5, "speed_high": 1.5}
    print_throughput([row | (few if row["what"] == "input" else enough) for row in rows])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("too few samples") == 1 and "0.50 – 1.50" in said and "nan" not in said
    assert "a larger --budget-s gives more samples" in said


def test_timms_model_is_of_the_same_size(tiny_config):
    pytest.importorskip("timm", reason="a peer: pip install effvit[peers]")
    config = tiny_config(intermediate_size=40, qkv_bias=False, num_channels=1)
    ours, theirs = ViT(config).state_dict(), timm_model(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_part_of_a_data_set_has_its_first_images(digits):
    part = first_images(digits, train=20, validation=3)
    for name, count in (("train", 20), ("validation", 3)):
        images, labels = part.split(name)
        assert len(images) == len(labels) == part.counts[name] == count
        assert (labels == digits.split(name)[1][:count]).all()
    assert len(digits.split("train")[1]) == digits.counts["train"] > 20


def test_too_few_images_are_an_error_that_says_how_many(digits, tiny_config):
    recipe = RECIPE.model_copy(update={"batch_size": 1000})
    options = {"horizontal_flip": False, "peer": False, "budget_s": 0.01, "device": torch.device("cpu")}
    with pytest.raises(UserError, match=r"batch_size=1000: a sample is 10 batches, and digits has only 1\d{3}"):
        measure_throughput(tiny_config(), digits, recipe, **options)


def test_the_command_writes_a_table_and_how_it_came_about(effvit, digits_dir, tmp_path):
    sizes = "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --intermediate-size 16 --batch-size 8"
    recipe = "--precision bf16-mixed --optimizer muon --randaugment 9 --budget-s 0.01 --device cpu"
    flags = f"{sizes} {recipe} --attention linformer -o k=3".split()
    outcome = effvit("bench-data", "--dataset-dir", digits_dir, "--output-dir", tmp_path / "out", *flags)
    assert outcome.code == 0, outcome.err
    assert "of a step of the loop" in " ".join(outcome.out.split())
    assert list(pd.read_csv(tmp_path / "out" / "throughput.csv")["what"]) == PARTS
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())["config"]
    assert record["model"]["attention_options"] == {"k": 3} and record["train"]["batch_size"] == 8
    expected = {"precision": "bf16-mixed", "optimizer": "muon", "randaugment": 9}
    assert {key: record["train"][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("flag", "value", "code"),
    [
        ("--budget-s", 0, 1),
        ("--batch-size", 0, 1),
        ("--threads", -1, 1),
        ("--precision", "8", 2),
        ("--precision", "16-mixed", 1),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(effvit, digits_dir, tmp_path, flag, value, code):
    outcome = effvit("bench-data", "--dataset-dir", digits_dir, "--output-dir", tmp_path / "out", flag, value)
    assert outcome.code == code and flag in outcome.err
    assert not (tmp_path / "out").exists()
