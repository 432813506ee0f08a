"""The model card, read by the hub's own library."""

import re

import pytest
import torch

from effvit import ViT, load_model, save_model
from effvit.model.card import is_card


@pytest.fixture
def read():
    """Read a directory's card."""
    cards = pytest.importorskip("huggingface_hub", reason="a peer: pip install huggingface_hub")
    return lambda directory: cards.ModelCard.load(directory / "README.md")


def test_the_hub_reads_library_licence_tags_and_accuracy(tiny_config, tmp_path, read):
    model = ViT(tiny_config(attention="linformer", attention_options={"k": 5}))
    save_model(model, tmp_path, dataset="digits", accuracy={"validation": 0.975, "test": 0.97}, license="apache-2.0")
    data = read(tmp_path).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("effvit", "apache-2.0", "image-classification")
    assert "linformer" in data.tags and data.metrics == ["accuracy"]
    results = [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results]
    assert results == [("digits", "validation", "accuracy", 0.975), ("digits", "test", "accuracy", 0.97)]


def test_a_card_of_a_model_of_which_nothing_is_known_claims_nothing(tiny_config, tmp_path, read):
    save_model(ViT(tiny_config()), tmp_path)
    card = read(tmp_path)
    assert card.data.eval_results is None and card.data.license == "mit"
    for word in ("Recipe", "top-1", "data |", "mean", "named in"):
        assert word not in card.text


def test_the_card_of_a_training_has_its_accuracy_data_and_recipe(trained, digits, read):
    import pandas as pd

    history = pd.read_csv(trained / "run-log" / "history.csv")
    for directory, epoch in ((trained / "run", None), (trained / "run" / "epoch-002", 2)):
        card = read(directory)
        (result,) = card.data.eval_results
        chosen = history["val_accuracy"].max() if epoch is None else history.set_index("epoch")["val_accuracy"][epoch]
        assert (result.dataset_name, result.dataset_split) == ("digits", "validation")
        assert result.metric_value == pytest.approx(chosen)
        for row in ("| lr | 0.005 |", "| seed | 0 |", "| batch_size | 64 |", "| data | digits |"):
            assert row in card.text
        assert f"| top-1, validation | {chosen:.2%} |" in card.text
        assert not re.search("workers|device|checkpoint_s", card.text)


def test_its_code_runs_as_written(trained, read):
    text = read(trained / "run").text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"images": torch.randn(2, 3, 16, 16)}
    exec(code.replace("path/of/this/directory", str(trained / "run")), names)
    assert names["logits"].shape == (2, 10)
    assert f"{sum(p.numel() for p in load_model(trained / 'run').parameters()):,} parameters" in text


@pytest.mark.parametrize("name", ["a: b\n- c", 'say "hi" | \\', "\N{GRINNING FACE} Ziffern", "no\udcfftext", "--- #"])
def test_any_name_of_a_data_set_leaves_the_card_whole(tiny_config, tmp_path, read, name):
    save_model(ViT(tiny_config()), tmp_path, dataset=name, accuracy={"test": 0.5}, recipe={"a|b": "c\nd"})
    card = read(tmp_path)
    assert card.data.eval_results[0].dataset_name.encode(errors="surrogatepass") == name.encode(errors="surrogatepass")
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * 2 + 6 + 1
    assert is_card((tmp_path / "README.md").read_text(encoding="utf-8"))
