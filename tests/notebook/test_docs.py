import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
OWN, FOREIGN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_first_block_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(OWN, names)
    history, shown = names["history"], capsys.readouterr().out
    assert isinstance(history, pd.DataFrame) and len(history) == 5
    scores = names["trainer"].evaluate(names["data"])
    assert scores["top1"] > 0.8 and str(scores["top1"]) in shown
    for name in ("samples.png", "attention.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
    table = names["predict"](names["load_model"]("runs/digits"), names["images"])
    labels = [names["data"].classes[label] for label in names["labels"]]
    assert (table["class"] == labels).mean() == pytest.approx(scores["top1"])
    assert table.head().to_string() in shown


def test_the_second_block_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(FOREIGN, names)
    assert len(names["history"]) == 2
    assert "'num_images': 64" in capsys.readouterr().out


def test_the_text_is_short():
    assert len(re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).split()) < 500
