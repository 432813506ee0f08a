"""Models looked into together: what the commands write, and that batches do not matter."""

import numpy as np
import pandas as pd
import pytest
import torch
from mps import on_mps

from effvit.analysis import survey as survey_module
from effvit.analysis.survey import survey
from effvit.evaluation.probe import few_classes, normalised, recorded, validation_images
from effvit.model.checkpoint import load_model, save_model
from effvit.model.vit import ViT

pytestmark = pytest.mark.slow

MECHANISMS = {
    "fused": {},
    "standard": {},
    "linformer": {"k": 6},
    "performer": {"num_features": 8},
    "nystromformer": {"num_landmarks": 5},
    "hybrid": {"window_size": 2, "fusion": "gate"},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tiny_config):
    """A directory each of an untrained model of every mechanism."""
    root = tmp_path_factory.mktemp("models")
    for seed, (attention, options) in enumerate(MECHANISMS.items()):
        torch.manual_seed(seed)
        (root / attention).mkdir()
        model = ViT(tiny_config(attention=attention, attention_options=options))
        for module in model.attentions():
            if attention == "hybrid":
                torch.nn.init.normal_(module.gate.weight)
        save_model(model, root / attention)
    return {attention: root / attention for attention in MECHANISMS}


@pytest.fixture(scope="module")
def models(directories):
    return {attention: load_model(directory) for attention, directory in directories.items()}


def arguments(directories, digits_dir, output, *attentions):
    chosen = [word for a in attentions or directories for word in ("--model-dir", directories[a])]
    return [*chosen, "--dataset-dir", digits_dir, "--output-dir", output, "--device", "cpu"]


def test_results_do_not_depend_on_the_size_of_batches(models, digits):
    images, _ = validation_images(digits, 31)
    whole, parts = (survey(models, images, digits, size) for size in (31, 8))
    for name, table in vars(whole).items():
        pd.testing.assert_frame_equal(table, getattr(parts, name), rtol=1e-4, atol=1e-6, obj=name)


def test_results_are_the_same_where_the_device_has_no_float64(models, digits, monkeypatch):
    images, _ = validation_images(digits, 9)
    expected, look_into = survey(models, images, digits, 9), survey_module._look_into
    monkeypatch.setattr(
        survey_module, "_look_into", lambda *given: tuple([on_mps(t) for t in found] for found in look_into(*given))
    )
    found = survey(models, images, digits, 9)
    for name, table in vars(expected).items():
        pd.testing.assert_frame_equal(table, getattr(found, name), obj=name)


def test_features_of_a_layer_are_its_tokens_mean_and_equal_models_are_alike(models, digits):
    images, _ = validation_images(digits, 40)
    model = models["fused"]
    table = survey({"fused": model, "standard": model, "hybrid": models["hybrid"]}, images, digits, 16).cka
    similarity = table.set_index(["attention_a", "layer_a", "attention_b", "layer_b"])["cka"]
    assert similarity["fused", 1, "standard", 1] == pytest.approx(1)
    assert similarity["fused", 2, "hybrid", 1] == pytest.approx(similarity["hybrid", 1, "fused", 2])
    features = []
    for each, layer in ((model, 1), (models["hybrid"], 0)):
        with torch.no_grad(), recorded(outputs_of=[each.blocks[layer]]) as outputs:
            each(normalised(each, images, digits))
        x = outputs[0].mean(dim=1).double()
        features.append(x - x.mean(dim=0))
    x, y = features
    expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert similarity["fused", 2, "hybrid", 1] == pytest.approx(expected.item(), rel=1e-6)


def test_gate_shares_are_the_mean_over_images_and_patches(models, digits):
    images, _ = validation_images(digits, 20)
    table = survey(models, images, digits, 7).gates
    assert set(table["attention"]) == {"hybrid"}
    np.testing.assert_allclose(table.groupby("layer")["share"].sum(), 1, rtol=1e-6)
    model = models["hybrid"]
    with torch.no_grad(), recorded(inputs_of=model.attentions()) as tokens:
        model(normalised(model, images, digits))
        shares = model.attentions()[1].gate_shares(tokens[1]).mean(dim=(0, 1))
    second = table[table["layer"] == 2]
    assert second["branch"].tolist() == model.attentions()[1].branch_names
    np.testing.assert_allclose(second["share"], shares, rtol=1e-5)


def test_blocks_without_a_gate_have_no_shares(tiny_config, digits):
    options = {"window_size": 2, "fusion": "gate", "global_every": 2}
    model = ViT(tiny_config(attention="hybrid", attention_options=options)).eval()
    images, _ = validation_images(digits, 5)
    table = survey({"hybrid": model}, images, digits, 5).gates
    with_gate = [layer for layer in range(1, len(model.blocks) + 1) if layer % 2]
    assert table["layer"].unique().tolist() == with_gate
    assert table["branch"].unique().tolist() == ["window r=1", "window r=2"]
    np.testing.assert_allclose(table["share"], 0.5)


def test_representations_writes_every_table_and_maps_of_the_same_images(
    effvit, directories, digits_dir, digits, tmp_path
):
    out = tmp_path / "out"
    outcome = effvit("representations", *arguments(directories, digits_dir, out))
    assert outcome.code == 0, outcome.err
    assert "6 models on" in outcome.out
    heads = pd.read_csv(out / "heads.csv")
    assert len(heads) == 6 * 2 * 2 and (heads["n_images"] == digits.counts["validation"]).all()
    assert heads.groupby("attention")["implied"].first().to_dict() == {
        a: a not in ("standard", "fused") for a in MECHANISMS
    }
    assert heads["distance_px"].between(0, 12 * 2**0.5).all() and heads["entropy_nats"].between(0, np.log(17)).all()
    assert heads["uniform_entropy_nats"].unique() == pytest.approx([np.log(17)])
    corners = np.stack(np.meshgrid(range(4), range(4)), -1).reshape(-1, 2) * 4
    pairs = np.linalg.norm(corners[:, None] - corners, axis=-1)
    assert heads["uniform_distance_px"].unique() == pytest.approx([pairs.mean()])
    assert len(pd.read_csv(out / "cka.csv")) == 12 * 12


def test_fidelity_is_the_same_bytes_whatever_other_mechanisms_are_there(effvit, directories, digits_dir, tmp_path):
    tables = {}
    for name, attentions in (("both", ("fused", "performer")), ("all", ("linformer", "fused", "performer"))):
        outcome = effvit("fidelity", *arguments(directories, digits_dir, tmp_path / name, *attentions))
        assert outcome.code == 0, outcome.err
        lines = [(tmp_path / name / f"{t}.csv").read_text().splitlines() for t in ("fidelity", "replaced")]
        tables[name] = [[line for line in table if not line.startswith("linformer")] for table in lines]
    assert tables["both"] == tables["all"]
    table = pd.read_csv(tmp_path / "all/fidelity.csv")
    assert set(table["source"]) == {"random", "trained"}
    assert table.loc[table["source"] == "random", "layer"].isna().all()
    assert set(table.loc[table["source"] == "trained", "layer"]) == {1, 2}
    replaced = pd.read_csv(tmp_path / "all/replaced.csv").set_index(["attention", "value"])
    assert replaced.loc[("linformer", 17), "top1"] == replaced.loc[("linformer", 17), "top1_fused"]


def test_fidelity_without_fused_says_what_is_left_out(effvit, directories, digits_dir, tmp_path):
    outcome = effvit("fidelity", *arguments(directories, digits_dir, tmp_path / "out", "linformer"))
    assert outcome.code == 0, outcome.err
    assert "no model with fused attention" in outcome.out
    assert set(pd.read_csv(tmp_path / "out/fidelity.csv")["source"]) == {"random"}
    assert pd.read_csv(tmp_path / "out/replaced.csv").empty


def save(root, config):
    root.mkdir()
    save_model(ViT(config), root)
    return root


@pytest.mark.parametrize("command", ["fidelity", "representations"])
def test_models_that_cannot_be_compared_are_told_in_a_line(
    effvit, command, directories, digits_dir, tiny_config, tmp_path
):
    def fails(*more):
        words = [word for directory in more for word in ("--model-dir", directory)]
        outcome = effvit(command, *arguments(directories, digits_dir, tmp_path / "out", "fused"), *words)
        assert outcome.code == 1 and outcome.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return outcome.err

    assert "a second model with fused; expected one of each mechanism" in fails(directories["fused"])
    wider = save(tmp_path / "wider", tiny_config(attention="linformer", attention_options={"k": 4}, hidden_size=32))
    assert "with hidden_size=32, the first one has 16" in fails(wider)
    other = save(tmp_path / "other", tiny_config(attention="linformer", attention_options={"k": 4}, num_classes=3))
    assert "3 classes" in fails(other)
    assert "no such file" in fails(tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["fidelity", "representations"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_with_their_model(
    effvit, command, value, directories, digits_dir, tmp_path
):
    model = load_model(directories["linformer"])
    with torch.no_grad():
        model.attentions()[0].E[0, 0] = value
    (tmp_path / "broken").mkdir()
    save_model(model, tmp_path / "broken")
    broken = {"fused": directories["fused"], "linformer": tmp_path / "broken"}
    outcome = effvit(command, *arguments(broken, digits_dir, tmp_path / "out"))
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert f"{tmp_path / 'broken'}: weights that are not finite numbers" in outcome.err
    assert not (tmp_path / "out").exists()


def test_recording_stops_with_its_block(models, digits):
    model = models["fused"]
    with recorded(inputs_of=model.attentions(), outputs_of=list(model.blocks)) as seen:
        pass
    model(torch.zeros(1, 3, 16, 16))
    assert seen == []


def test_pictures_show_one_image_of_each_of_a_few_classes():
    labels = np.array([4, 4, 2, 2, 7, 9, 2])
    assert few_classes(labels, 3).tolist() == [2, 4, 5]
    assert few_classes(labels, 99).tolist() == [2, 0, 4, 5]
