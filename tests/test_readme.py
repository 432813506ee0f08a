import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import gmean

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def block(language, holding):
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (each for each in blocks if holding in each)
    return found


def test_the_mechanism_that_the_readme_adds_passes_the_tests_that_all_mechanisms_pass(tmp_path):
    for part in ("effvit", "tests", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "effvit/attention/mean.py").write_text(block("python", "class MeanAttention"), encoding="utf-8")
    (tmp_path / "conf/attention/mean.yaml").write_text(block("yaml", "mean: {}"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "mean", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "tests/attention", "tests/measure/test_macs.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 15


def test_every_model_that_the_readme_uses_is_trained_before():
    made = set()
    for line in block("bash", "effvit prepare --dataset digits").replace("\\\n", " ").splitlines():
        assert set(re.findall(r"--model-dir (runs/\S+)", line)) <= made, line
        made |= set(re.findall(r"effvit train .*--output-dir (\S+)", line))
    assert made == {"runs/linformer", "runs/fused"}


@pytest.mark.parametrize("file", ["README.md", "docs/cifar10.md"])
def test_the_tables_of_cifar10_say_what_the_data_say(file):
    data = ROOT / "docs/cifar10/data"
    accuracy, paired = (pd.read_csv(data / f"{name}.csv").set_index("attention") for name in ("accuracy", "paired"))
    cost = pd.read_csv(data / "cost.csv").set_index(["attention", "quantity", "batch_size"])
    text = (ROOT / file).read_text(encoding="utf-8")
    for attention, row in accuracy.iterrows():
        (line,) = re.findall(rf"^\| `{attention}` \| \d.*%.*\|$", text, re.MULTILINE)
        latency = cost.loc[(attention, "latency", 64)]
        memory = cost.loc[(attention, "train_memory", 64), "ratio_to_fused"]
        said = [
            f"{100 * row['top1']:.1f} %",
            f"{latency['ratio_to_fused']:.2f} ({latency['ratio_low']:.2f} to {latency['ratio_high']:.2f})",
        ]
        if attention != "fused":
            of = paired.loc[attention, ["difference", "difference_low", "difference_high"]]
            difference, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in of)
            said += [f"{difference} ({low} to {high})", f" {memory:.2f} |"]
        assert [each for each in said if each not in line] == [], line


def test_the_table_of_public_modules_says_what_the_data_say():
    points = pd.read_csv(ROOT / "docs/peers/peers.csv")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for attention, rows in points[points["peer"].notna()].groupby("attention"):
        (line,) = re.findall(rf"^\| `{attention}` \| (?:timm|`).*\|$", text, re.MULTILINE)
        said = []
        for mode in ("forward", "train"):
            ratios = rows.loc[rows["mode"] == mode, "ratio"]
            said.append(f"{gmean(ratios):.2f} ({ratios.min():.2f} – {ratios.max():.2f})")
        (longest,) = rows.query("tokens == 4097 and hidden_size == 192 and mode == 'train'").itertuples()
        said.append(f"{longest.peer_bytes / longest.ours_bytes:.2f} |")
        assert " | ".join(said) in line, said
