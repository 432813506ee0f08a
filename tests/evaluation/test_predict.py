import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from effvit.attention import available_attention
from effvit.data.loading.prepared import write_files
from effvit.data.loading.transforms import to_float
from effvit.device import pick_device
from effvit.errors import UserError
from effvit.evaluation.mistakes import mistake_sheet
from effvit.evaluation.overlay import map_sheet, overlay
from effvit.evaluation.predict import check_fits, map_test_images, rollout_maps, score_test_split
from effvit.model.checkpoint import load_model
from effvit.model.vit import ViT


@pytest.fixture
def model(trained):
    return load_model(trained / "run")


def test_scores_are_those_of_the_whole_test_split(model, digits, tmp_path):
    scores = score_test_split(model, digits, tmp_path, batch_size=64)
    images, labels = digits.split("test")
    with torch.no_grad():
        logits = model(to_float(torch.from_numpy(images[:]), digits.mean, digits.std))
    right = logits.argmax(1).numpy() == labels
    assert json.loads((tmp_path / "evaluation.json").read_text()) == scores
    assert scores["top1"] == pytest.approx(right.mean()) and scores["num_images"] == len(labels)
    table, pairs = pd.read_csv(tmp_path / "per_class.csv"), pd.read_csv(tmp_path / "confusion.csv")
    assert (table["top1"] * table["num_images"]).sum() == pytest.approx(right.sum())
    assert pairs["count"].sum() == len(labels)
    assert pairs.loc[pairs["actual"] == pairs["predicted"], "count"].sum() == right.sum()
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert predictions["label"].tolist() == labels.tolist() and predictions["index"].tolist() == list(
        range(len(labels))
    )
    assert predictions["prediction"].tolist() == logits.argmax(1).tolist()


def test_scoring_again_gives_the_same_bytes(model, digits, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        score_test_split(model, digits, tmp_path / name, batch_size=64)
        map_test_images(model, digits, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_predictions_name_the_file_of_each_image_where_it_is_known(model, digits, tmp_path):
    names = [f"test/{label}/ä, {index}\n.png" for index, label in enumerate(digits.split("test")[1])]
    write_files(tmp_path / "test_files.csv", names)
    named = replace(digits, file_lists={"test": tmp_path / "test_files.csv"})
    for name, dataset in (("with", named), ("without", digits)):
        (tmp_path / name).mkdir()
        score_test_split(model, dataset, tmp_path / name, batch_size=64)
    table = pd.read_csv(tmp_path / "with" / "predictions.csv")
    assert table.pop("file").tolist() == names
    assert table.equals(pd.read_csv(tmp_path / "without" / "predictions.csv"))


def test_worst_mistakes_are_drawn_and_without_mistakes_nothing_is(model, digits, tmp_path):
    score_test_split(model, digits, tmp_path, batch_size=64, worst=7)
    with Image.open(tmp_path / "worst.png") as picture:
        assert np.asarray(picture).std() > 0
    (tmp_path / "right").mkdir()
    labels = pd.read_csv(tmp_path / "predictions.csv")["prediction"].to_numpy()
    right = replace(digits, arrays=digits.arrays | {"test_labels": labels})
    score_test_split(model, right, tmp_path / "right", batch_size=64, worst=7)
    assert not (tmp_path / "right" / "worst.png").exists()


def test_sheet_of_mistakes_has_a_captioned_cell_per_image():
    images = [np.full((8, 8, 3), index, dtype=np.uint8) for index in range(7)]
    captions = [[f"class {index}", "$x$\t" + "long" * 20 + f"{index}.png"] for index in range(7)]
    cells = [axes for axes in mistake_sheet(images, captions, "heading").axes if axes.get_visible()]
    assert len(cells) == 7
    for index, axes in enumerate(cells):
        assert (axes.images[0].get_array() == index).all()
        first, second = axes.get_xlabel().split("\n")
        assert first == f"class {index}" and second.endswith(f"{index}.png") and len(second) < 40


def test_model_that_gives_no_numbers_is_a_user_error(model, digits, tmp_path):
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        score_test_split(model, digits, tmp_path, batch_size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"num_classes": 11}, {"image_size": 32}])
def test_model_for_other_data_is_refused(tiny_config, digits, changes):
    with pytest.raises(UserError) as caught:
        check_fits(ViT(tiny_config(**changes)), digits)
    for number in ("10 classes", "16 pixels", str(*changes.values())):
        assert number in str(caught.value)


def test_maps_are_of_one_image_a_class_and_the_same_for_every_model(model, tiny_config, digits, tmp_path):
    maps = {}
    for name, mapped in (("trained", model), ("fresh", ViT(tiny_config(attention="performer")).eval())):
        (tmp_path / name).mkdir()
        map_test_images(mapped, digits, tmp_path / name)
        maps[name] = load_file(tmp_path / name / "attention_maps.safetensors")
        with Image.open(tmp_path / name / "attention_maps.png") as picture:
            assert np.asarray(picture).std() > 0
    arrays = maps["trained"]
    assert np.array_equal(arrays["images"], maps["fresh"]["images"])
    assert arrays["labels"].dtype == arrays["predictions"].dtype == np.int64 and len(set(arrays["labels"])) == 6
    images, labels = digits.split("test")
    for image, label in zip(arrays["images"], arrays["labels"], strict=True):
        assert np.array_equal(image, images[int(np.flatnonzero(labels == label)[0])])
    assert arrays["maps"].dtype == np.float32 and arrays["maps"].shape == (6, 4, 4)
    assert np.allclose(arrays["maps"].sum((1, 2)), 1, atol=1e-5)
    with torch.no_grad():
        logits = model(to_float(torch.from_numpy(arrays["images"]), digits.mean, digits.std))
    assert np.array_equal(arrays["predictions"], logits.argmax(1).numpy())


@pytest.mark.parametrize("attention", available_attention())
def test_every_mechanism_gives_maps_and_the_logits_it_gives_without(tiny_config, digits, attention):
    options = {"linformer": {"k": 4}, "nystromformer": {"num_landmarks": 4}, "hybrid": {"window_size": 2}}
    torch.manual_seed(0)
    model = ViT(tiny_config(attention=attention, attention_options=options.get(attention, {}))).eval()
    images = digits.split("test")[0][:3]
    logits, maps = rollout_maps(model, images, digits.mean, digits.std)
    with torch.no_grad():
        expected = model(to_float(torch.from_numpy(images), digits.mean, digits.std))
    assert torch.allclose(logits, expected, atol=1e-4)
    assert maps.shape == (3, 4, 4) and np.allclose(maps.sum((1, 2)), 1, atol=1e-5) and (maps >= 0).all()


def test_device_is_one_that_is_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
    with pytest.raises(UserError, match=r"device='tpu'.*cpu"):
        pick_device("tpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(UserError, match=f"device={name}: not available"):
                pick_device(name)


def test_overlay_is_brightest_where_the_map_is_highest():
    patch_map = np.zeros((4, 4))
    patch_map[2, 1] = 7.0
    drawn = overlay(np.full((32, 32, 3), 100, dtype=np.uint8), patch_map).sum(-1)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (row // 8, column // 8) == (2, 1)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_overlay_of_an_even_map_is_even(value):
    drawn = overlay(np.full((8, 8, 3), 100, dtype=np.uint8), np.full((2, 2), value))
    assert drawn.dtype == np.uint8 and len(np.unique(drawn.reshape(-1, 3), axis=0)) == 1


def test_sheet_has_a_titled_column_an_image():
    images = [np.zeros((8, 8, 3), dtype=np.uint8)] * 3
    figure = map_sheet(images, [np.eye(2)] * 3, ["a", "b", "c"], "heading")
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["a", "b", "c"]
