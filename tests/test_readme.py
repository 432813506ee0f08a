import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
        [*command, "tests/test_attention_contract.py", "tests/test_macs.py", "tests/test_numerics.py"],
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
