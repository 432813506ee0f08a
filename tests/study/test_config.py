import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from effvit.errors import UserError
from effvit.study.config import Study

PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8"))
REMOVED = object()


def load(tmp_path, **changes):
    """Load params.yaml with changes given as one writes them after -S, dots as double underscores."""
    values = deepcopy(PARAMS)
    for key, value in changes.items():
        *path, last = key.split("__")
        group = values
        for part in path:
            group = group[part]
        if value is REMOVED:
            del group[last]
        else:
            group[last] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return Study.load(tmp_path / "params.yaml")


@pytest.mark.slow
def test_reading_the_study_imports_nothing_that_takes_seconds():
    """Every stage does so first."""
    slow = ["torchvision", "torch._dynamo", "lightning_fabric", "pandas", "scipy"]
    code = f"import sys, effvit.study.config; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_committed_params_are_valid(tmp_path):
    study = load(tmp_path)
    assert list(study.attention) and study.vit("digits", "fused").attention == "fused"


def test_one_mechanism_alone_is_a_study(tmp_path):
    assert list(load(tmp_path, attention={"linformer": {"k": 8}}).attention) == ["linformer"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"attention": {"lineformer": {}}}, ["attention", "lineformer", "linformer", "hybrid"]),
        ({"dataset": {"mnist": PARAMS["dataset"]["digits"]}}, ["dataset", "mnist", "digits", "cifar10"]),
        ({"attention": {}}, ["attention"]),
        ({"dataset": {}}, ["dataset"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [0, 0]}, ["seeds", "once"]),
        ({"seeds": [-1]}, ["seeds.0=-1"]),
        ({"seeds": [2**32]}, ["seeds.0=4294967296"]),
        ({"typo": 1}, ["typo", "unknown"]),
        ({"train__learning_rate": 1}, ["train.learning_rate", "unknown"]),
        ({"train__epochs": REMOVED}, ["train.epochs", "missing"]),
        ({"attention__linformer__k": 0}, ["attention.linformer.k=0"]),
        ({"attention__linformer__k": -3}, ["attention.linformer.k=-3"]),
        ({"attention__linformer__k": 66}, ["attention.linformer.k=66", "65"]),
        ({"attention__linformer__k": 1.5}, ["attention.linformer.k=1.5", "integer"]),
        ({"attention__linformer__k": "many"}, ["attention.linformer.k='many'", "integer"]),
        ({"attention__linformer__k": True}, ["attention.linformer.k=True", "integer"]),
        ({"attention__linformer__share": "all"}, ["attention.linformer.share='all'", "heads"]),
        ({"attention__linformer__features": 3}, ["attention.linformer.features", "unknown"]),
        ({"attention__performer__num_features": 0}, ["attention.performer.num_features=0"]),
        ({"attention__performer__num_features": 2.5}, ["attention.performer.num_features=2.5"]),
        ({"attention__performer__redraw_every": -1}, ["attention.performer.redraw_every=-1"]),
        ({"attention__nystromformer__num_landmarks": 0}, ["attention.nystromformer.num_landmarks=0"]),
        ({"attention__nystromformer__num_landmarks": -2}, ["attention.nystromformer.num_landmarks=-2"]),
        ({"attention__nystromformer__num_landmarks": "x"}, ["attention.nystromformer.num_landmarks='x'"]),
        ({"attention__nystromformer__conv_kernel_size": 4}, ["attention.nystromformer.conv_kernel_size=4", "odd"]),
        ({"attention__hybrid__window_size": 0}, ["attention.hybrid.window_size=0"]),
        ({"attention__hybrid__window_size": 9}, ["attention.hybrid.window_size=9", "8"]),
        ({"attention__hybrid__branches": ["global"]}, ["attention.hybrid.branches", "global"]),
        ({"model__num_attention_heads": 5}, ["model.num_attention_heads=5", "hidden_size=48"]),
        ({"model__hidden_size": 0}, ["model.hidden_size=0"]),
        ({"model__hidden_dropout_prob": 1.0}, ["model.hidden_dropout_prob=1.0"]),
        ({"dataset__digits__patch_size": 5}, ["dataset.digits.patch_size=5", "image_size=32"]),
        ({"dataset__digits__patch_size": 0}, ["dataset.digits.patch_size=0"]),
        ({"dataset__digits__image_size": "32"}, ["dataset.digits.image_size='32'", "integer"]),
        ({"train__min_crop_area": 0}, ["train.min_crop_area=0"]),
        ({"train__min_crop_area": 1.1}, ["train.min_crop_area=1.1"]),
        ({"train__epochs": 0}, ["train.epochs=0"]),
        ({"train__epochs": 1.5}, ["train.epochs=1.5"]),
        ({"train__batch_size": 0}, ["train.batch_size=0"]),
        ({"train__lr": 0}, ["train.lr=0"]),
        ({"train__lr": "fast"}, ["train.lr='fast'", "number"]),
        ({"train__lr": float("nan")}, ["train.lr=nan", "finite"]),
        ({"train__lr": float("inf")}, ["train.lr=inf", "finite"]),
        ({"train__clip_norm": float("inf")}, ["train.clip_norm=inf", "finite"]),
        ({"train__label_smoothing": 1}, ["train.label_smoothing=1"]),
        ({"train__device": "tpu"}, ["train.device='tpu'", "auto"]),
        ({"benchmark__batch_size": 0}, ["benchmark.batch_size=0"]),
        ({"benchmark__budget_s": 0}, ["benchmark.budget_s=0"]),
        ({"scaling__tokens": []}, ["scaling.tokens"]),
        ({"scaling__tokens": [65, 0]}, ["scaling.tokens.1=0"]),
        ({"scaling__memory_mib": -1}, ["scaling.memory_mib=-1"]),
        ({"train": None}, ["train"]),
        ({"train__crop_padding": 32}, ["train.crop_padding=32", "image_size=32"]),
        ({"train__batch_size": 2**31}, ["train.batch_size=2147483648"]),
        ({"train__devices": 10**9}, ["train.devices=1000000000", "1024"]),
        ({"model__hidden_size": 4 * 10**9}, ["model.hidden_size=4000000000", "65536"]),
        ({"attention__performer__num_features": 10**11}, ["attention.performer.num_features=100000000000", "65536"]),
        ({"attention__nystromformer__conv_kernel_size": 9999999}, ["nystromformer.conv_kernel_size=9999999", "1025"]),
        ({"attention__linformer": None}, ["attention.linformer"]),
    ],
)
def test_bad_value_is_told_in_one_line_with_its_key(tmp_path, changes, parts):
    with pytest.raises(UserError) as caught:
        load(tmp_path, **changes)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert part in message


def test_fewer_epochs_than_the_warm_up_are_valid_by_themselves(tmp_path):
    train = load(tmp_path, train__epochs=1).train
    assert train.warmup_epochs == 1 and train.with_warmup_that_fits().warmup_epochs == 0.1
    unchanged = load(tmp_path).train
    assert unchanged.with_warmup_that_fits() is unchanged


@pytest.mark.parametrize("text", ["[1, 2]", "", "just words", "a: [1", "1: 2", "attention: *missing"])
def test_file_that_is_no_study_is_a_user_error(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError):
        Study.load(tmp_path / "params.yaml")
