"""What the documentation shows is run as it stands."""

import re
from pathlib import Path

import pytest
from hosts import TIMM_REASON

from effvit.attention import attention_class
from effvit.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN_MODEL = (ROOT / "docs/own-model.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_swaps_attention():
    pytest.importorskip("timm", reason=TIMM_REASON)
    section = re.search(r"^## Your own model\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    (block,) = blocks(section, "python")
    names = {}
    exec(block, names)
    assert names["logits"].shape == (2, 1000) and len(names["report"].layers) == 6


def test_all_of_own_model_runs_and_prints_what_it_says(capsys, tmp_path, monkeypatch):
    for library in ("timm", "transformers"):
        pytest.importorskip(library, reason=f"not installed: pip install {library}")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(OWN_MODEL, "python"):
        exec(block, names)
    (expected,) = blocks(OWN_MODEL, "text")
    assert capsys.readouterr().out == expected
    assert names["report"].new == [] and names["outputs"].attentions[0].shape == (2, 3, 65, 65)


def test_own_model_is_short():
    assert len(OWN_MODEL.split()) < 1120


def test_the_line_about_an_unknown_mechanism_names_all_that_there_are():
    with pytest.raises(UserError) as caught:
        attention_class("mean")
    assert f"| unknown mechanism | `{caught.value}` |" in OWN_MODEL
