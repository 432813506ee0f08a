"""A trained model beside a data set that it was not trained on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from effvit import ViT, load_model, save_model
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.evaluation.predict import check_fits, score_test_split
from effvit.evaluation.probe import load_models
from effvit.model.trained_on import TrainedOn

CPU = torch.device("cpu")
OTHERS = ("horse", "zebra", "cow", "pig", "hen", "duck", "goat", "sheep", "ox", "mule")


def edit(directory, **changes):
    """Change meta.json of a prepared data set."""
    file = directory / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


@pytest.fixture
def others_dir(digits_dir, tmp_path):
    """The digits under the names of animals."""
    return edit(shutil.copytree(digits_dir, tmp_path / "animals"), name="animals", classes=OTHERS)


COMMANDS = {
    "evaluate": ["--output-dir", "out"],
    "predict": ["image.png"],
    "attention-map": ["image.png", "--output", "out.png"],
    "fidelity": ["--output-dir", "out"],
    "representations": ["--output-dir", "out"],
    "deploy": ["--output-dir", "out"],
    "export": ["--output", "out.onnx"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_data_set_of_other_classes_in_one_line(effvit, trained, others_dir, tmp_path, command):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "image.png")
    before = set(tmp_path.iterdir())
    outcome = effvit(command, "--model-dir", trained / "run", "--dataset-dir", others_dir, *COMMANDS[command])
    assert outcome.code == 1 and not outcome.out
    assert outcome.err == (
        "error: the model was trained for other classes than animals has: 0, 1, 2, 3, 4 and 5 more "
        "in place of horse, zebra, cow, pig, hen and 5 more\n"
    )
    assert set(tmp_path.iterdir()) == before


def test_some_other_classes_and_the_same_in_another_order_are_refused_by_name(trained, digits):
    model = load_model(trained / "run")
    model.trained_on = TrainedOn(classes=digits.classes)
    with pytest.raises(UserError, match=r"than digits has: 3 in place of drei$"):
        check_fits(model, replace(digits, classes=(*"012", "drei", *"456789")))
    with pytest.raises(UserError, match=r"in another order: class 3 is 3, in digits 4$"):
        check_fits(model, replace(digits, classes=(*"012", *"43", *"56789")))
    with pytest.raises(UserError, match=r"than digits has: 9 in place of none$"):
        check_fits(model, replace(digits, classes=(*"012345678", "8")))


def test_a_model_that_does_not_know_its_data_takes_those_of_the_data_set(trained, others_dir, capsys):
    model, animals = load_model(trained / "run"), PreparedDataset.load(others_dir)
    model.trained_on = TrainedOn()
    assert check_fits(model, animals) is animals
    assert capsys.readouterr().err == ""


def test_images_are_normalised_as_the_model_was_trained(trained, digits, tmp_path, capsys):
    model = load_model(trained / "run")
    assert check_fits(model, digits) is digits and capsys.readouterr().err == ""
    brighter = replace(digits, name="brighter", mean=(0.9, 0.9, 0.9), std=(0.1, 0.2, 0.3))
    taken = check_fits(model, brighter)
    assert (taken.mean, taken.std) == (digits.mean, digits.std)
    said = "brighter: normalised by the model's own mean and deviation, not the data set's\n"
    assert capsys.readouterr().err == said
    scores = [score_test_split(model, data, tmp_path, 128) for data in (digits, taken, brighter)]
    assert scores[0] == scores[1] != scores[2]


def test_of_several_models_one_line_says_how_images_are_normalised(trained, digits, tmp_path, tiny_config, capsys):
    other = load_model(trained / "run")
    performer = ViT(tiny_config(attention="performer"))
    performer.trained_on = other.trained_on
    save_model(performer, tmp_path / "performer")
    brighter = replace(digits, name="brighter", mean=(0.9, 0.9, 0.9), std=(0.1, 0.2, 0.3))
    _, _, data = load_models([trained / "run", tmp_path / "performer"], brighter, CPU)
    assert data.mean == digits.mean and capsys.readouterr().err.count("normalised by the model's own") == 1


@pytest.mark.parametrize("command", ["fidelity", "representations"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_model_without_a_class_token_alone_is_refused_where_that_is_looked_at(
    effvit, digits_dir, tmp_path, tiny_config, command, tokens
):
    save_model(ViT(tiny_config(prefix_tokens=tokens)), tmp_path / "model")
    outcome = effvit(command, "--model-dir", "model", "--dataset-dir", digits_dir, "--output-dir", "out")
    assert outcome.code == 1 and not (tmp_path / "out").exists()
    assert outcome.err.startswith(f"error: model: a model with prefix_tokens={tokens}; expected 1, the class token")


def test_models_trained_on_another_scale_are_not_compared(trained, digits, tmp_path):
    copy = shutil.copytree(trained / "run", tmp_path / "other")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention": "standard", "mean": [0.5] * 3}))
    from safetensors.torch import load_file, save_file

    from effvit.model.names import fused_to_standard

    weights = fused_to_standard(load_file(copy / "model.safetensors"), config["num_attention_heads"])
    save_file(weights, copy / "model.safetensors")
    models, _, data = load_models([trained / "run"], digits, CPU)
    assert list(models) == ["fused"] and data is digits
    with pytest.raises(UserError, match="other: a model trained with another mean and deviation of images"):
        load_models([trained / "run", copy], digits, CPU)
    _, _, data = load_models([copy], digits, CPU)
    assert data.mean == (0.5, 0.5, 0.5)
