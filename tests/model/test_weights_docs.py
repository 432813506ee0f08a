"""docs/weights.md: what it shows runs as written."""

import re
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "weights.md"
TEXT = DOC.read_text(encoding="utf-8")


def test_its_python_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saving, measuring = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names, measured = {}, {}
    exec(saving, names)
    exec(measuring, measured)  # each runs alone
    assert sorted(path.name for path in (tmp_path / "cats-and-dogs").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert names["model"].trained_on.classes == ("cat", "dog")
    assert "performer" in capsys.readouterr().out and list(measured["table"].index) == ["fused", "performer"]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_its_export_runs_as_written(effvit, trained, tmp_path, library):
    (line,) = re.findall(rf"^effvit (export .*--format {library} .*)$", TEXT, re.MULTILINE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "fused").symlink_to(trained / "run")
    outcome = effvit(*line.split())
    assert outcome.code == 0, outcome.err
    assert (tmp_path / f"fused-{library}.safetensors").is_file()
