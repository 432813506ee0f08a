import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effvit.attention import attention_class, available_attention
from effvit.cli.app import COMMANDS

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).with_name("effvit")
HEAVY = "{'torch', 'numpy', 'pandas', 'matplotlib', 'dvc', 'PIL'}"


def words(text):
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.fixture
def pictures(tmp_path, digits):
    """Three test images as files, one of them grey and of another size."""
    paths = [tmp_path / name for name in ("first.png", "second.jpg", "third.png")]
    for path, image in zip(paths, digits.split("test")[0][:3], strict=True):
        Image.fromarray(image).save(path, quality=95)
    Image.open(paths[2]).convert("L").resize((40, 50)).save(paths[2])
    return paths


def test_help_imports_nothing_slow():
    code = f"""
import sys
from effvit.cli.app import main
assert not {HEAVY} & sys.modules.keys(), "importing"
for command in {[[], *([c.replace("_", "-")] for c in COMMANDS)]!r}:
    sys.argv = ["effvit", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    assert not {HEAVY} & sys.modules.keys(), command
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert command.replace("_", "-") in result.stdout


def test_every_command_and_option_is_explained(effvit):
    for command in COMMANDS:
        text = words(effvit(command.replace("_", "-"), "--help").out)
        flags = set(re.findall(r"--[a-z0-9-]+", text)) - {"--help"}
        assert len(text) > 100 and (flags or command == "mechanisms")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "Missing option '--dataset-dir'"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--epochs", "x"], "'--epochs'"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--bogus", "1"], "--bogus"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--seed", "-1"], "'--seed'"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--seed", "4294967296"], "'--seed'"),
        (["evaluate", "--model-dir", "m"], "Missing option"),
        (["predict"], "Missing"),
        (["predict", "x.png", "--model-dir", "m", "--dataset-dir", "d", "--top", "0"], "'--top'"),
        (["evaluate", "--model-dir", "m", "--batch-size", "0"], "'--batch-size'"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--device", "tpu"], "'--device'"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--optimizer", "sgd"], "'adamw', 'muon'"),
        (["train", "--dataset-dir", "d", "--output-dir", "o", "--attenton", "fused"], "--attention"),
        (["nonsense"], "No such command 'nonsense'"),
        (["export", "--model-dir", "m", "--output", "a.onnx", "--format", "torch"], "'onnx', 'timm', 'transformers'"),
        (["bench-peers", "--output-dir", "o", "--dtype", "int8"], "'float32', 'bfloat16'"),
        (["trian"], "Did you mean 'train'"),
        (["scaling", "--attention", "fused", "--output-dir", "o", "--tokens", "197,many"], "197 or 197,577"),
        (["bench-peers", "--output-dir", "o", "--attention", "fused,,linformer"], "'--attention'"),
    ],
)
def test_wrong_usage_is_one_clear_message(effvit, tmp_path, arguments, part):
    outcome = effvit(*arguments)
    assert outcome.code == 2 and part in words(outcome.err)
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_installed_script_ends_in_one_line(tmp_path, digits_dir):
    assert SCRIPT.exists()
    command = [SCRIPT, "train", "--dataset-dir", digits_dir, "--output-dir", "out", "--attention", "magic"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: --attention 'magic'") and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [80, 200])
def test_mechanisms_lists_names_options_complexity_and_papers(effvit, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = effvit("mechanisms")
    assert outcome.code == 0 and "…" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= columns
    words = set(outcome.out.split())
    for name in available_attention():
        mechanism = attention_class(name)
        options = [f"{key}={value}" for key, value in mechanism.Options().model_dump().items()]
        for text in (name, mechanism.complexity, mechanism.paper, *options):
            assert set(text.split()) <= words, text


def test_predict_names_the_classes_most_likely_first(effvit, trained, digits_dir, digits, pictures):
    outcome = effvit("predict", *pictures, "--model-dir", trained / "run", "--dataset-dir", digits_dir, "--top", 4)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert len(lines) == 3
    for path, line in zip(pictures, lines, strict=True):
        assert line.startswith(f"{path}: ")
        named = re.findall(r"(\S+) ([\d.]+)%", line.removeprefix(f"{path}: "))
        shares = [float(share) for _, share in named]
        assert len(named) == 4 and {name for name, _ in named} <= set(digits.classes)
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5


def test_predict_says_what_the_model_says_of_the_image_itself(effvit, trained, digits_dir, digits, pictures):
    from effvit.evaluation.score import predict_logits
    from effvit.model.checkpoint import load_model

    images, _ = digits.split("test")
    logits = predict_logits(load_model(trained / "run"), images[:1], digits.mean, digits.std, 1)
    best = digits.classes[int(logits.argmax())]
    outcome = effvit("predict", pictures[0], "--model-dir", trained / "run", "--dataset-dir", digits_dir, "--top", 1)
    assert outcome.out == f"{pictures[0]}: {best} {logits.softmax(1).max():.1%}\n"


def test_a_model_needs_no_data_set_to_look_at_image_files(effvit, trained, digits_dir, pictures, tmp_path):
    model, dataset = ["--model-dir", trained / "run"], ["--dataset-dir", digits_dir]
    alone, beside = effvit("predict", *pictures, *model), effvit("predict", *pictures, *model, *dataset)
    assert alone == beside and alone.code == 0
    for name, more in (("alone.png", []), ("beside.png", dataset)):
        assert effvit("attention-map", *pictures, *model, *more, "--output", name).code == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "beside.png").read_bytes()


@pytest.mark.parametrize("command", [["predict"], ["attention-map", "--output", "map.png"]])
def test_a_model_that_knows_no_normalisation_asks_for_its_data_set(effvit, trained, pictures, tmp_path, command):
    copy = shutil.copytree(trained / "run", tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"mean": None, "std": None}))
    outcome = effvit(*command, pictures[0], "--model-dir", copy)
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "does not know how its images were normalised; give the data set of its training" in outcome.err


def test_attention_map_draws_a_picture_the_same_each_time(effvit, trained, digits_dir, pictures, tmp_path):
    for name in ("one.png", "two.png"):
        arguments = ["--model-dir", trained / "run", "--dataset-dir", digits_dir, "--output", tmp_path / name]
        outcome = effvit("attention-map", *pictures, *arguments)
        assert outcome.code == 0 and name in outcome.out, outcome.err
    with Image.open(tmp_path / "one.png") as drawn:
        assert drawn.format == "PNG" and np.asarray(drawn).std() > 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("command", ["predict", "attention-map"])
@pytest.mark.parametrize("content", [None, b"", b"no image at all", "truncated"])
def test_bad_image_is_named_and_nothing_written(effvit, trained, digits_dir, pictures, tmp_path, command, content):
    bad = tmp_path / "bad.png"
    if content == "truncated":
        bad.write_bytes(pictures[0].read_bytes()[:150])
    elif content is not None:
        bad.write_bytes(content)
    arguments = ["--model-dir", trained / "run", "--dataset-dir", digits_dir]
    arguments += ["--output", tmp_path / "out.png"] if command == "attention-map" else []
    outcome = effvit(command, pictures[0], bad, *arguments)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1 and "bad.png" in outcome.err
    assert not (tmp_path / "out.png").exists()


def test_without_arguments_it_helps(effvit):
    outcome = effvit()
    assert outcome.code == 0 and "Usage" in outcome.out and "attention-map" in outcome.out


def test_names_of_images_need_not_be_text(trained, digits_dir, pictures, tmp_path):
    """In a process of its own, as the streams here are pytest's."""
    odd = os.fsencode(tmp_path) + b"/$\\bad$\xff.png"
    shutil.copyfile(pictures[0], odd)
    place = ["--model-dir", trained / "run", "--dataset-dir", digits_dir]
    for command in (["predict", odd, *place], ["attention-map", odd, *place, "--output", b"\xff.png"]):
        result = subprocess.run([SCRIPT, *command], capture_output=True, cwd=tmp_path, check=False)
        assert result.returncode == 0 and b"\\udcff.png" in result.stdout, result.stderr


def test_attention_map_is_a_png_or_nothing(effvit, trained, digits_dir, pictures):
    arguments = ["--model-dir", trained / "run", "--dataset-dir", digits_dir, "--output", "map.jpeg"]
    outcome = effvit("attention-map", pictures[0], *arguments)
    assert outcome.code == 1 and "--output map.jpeg" in outcome.err and ".png" in outcome.err


def test_evaluate_writes_every_file_and_says_the_scores(effvit, trained, digits_dir, tmp_path):
    arguments = ["--model-dir", trained / "run", "--dataset-dir", digits_dir, "--output-dir", tmp_path / "scores"]
    outcome = effvit("evaluate", *arguments)
    assert outcome.code == 0 and "top-1" in outcome.out and "top-5" in outcome.out, outcome.err
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "attention_maps.png",
        "attention_maps.safetensors",
        "confusion.csv",
        "evaluation.json",
        "per_class.csv",
        "predictions.csv",
        "provenance.json",
    ]


def test_evaluate_draws_the_worst_mistakes_and_replaces_what_it_wrote(effvit, trained, digits_dir, tmp_path):
    arguments = ["--model-dir", trained / "run", "--dataset-dir", digits_dir, "--output-dir", tmp_path / "scores"]
    for options, there in ((["--worst", 3], True), ([], False)):
        assert effvit("evaluate", *arguments, *options).code == 0
        assert (tmp_path / "scores" / "worst.png").exists() == there


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"--model-dir": "nowhere"}, "nowhere"),
        ({"--dataset-dir": "nowhere"}, "nowhere"),
        ({"--output-dir": "model"}, "model"),
        ({"--output-dir": "."}, "replaced as a whole"),
    ],
)
def test_evaluate_with_a_wrong_argument_ends_in_one_line(effvit, trained, digits_dir, tmp_path, changes, part):
    shutil.copytree(trained / "run", tmp_path / "model")
    given = {"--model-dir": "model", "--dataset-dir": digits_dir, "--output-dir": "scores"} | changes
    outcome = effvit("evaluate", *(word for pair in given.items() for word in pair))
    assert outcome.code == 1 and outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    assert part in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").exists(), "the model it was given is still there"
