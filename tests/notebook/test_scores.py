from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from effvit import ViT, ViTConfig, evaluate, open_data, predict, prepare_data
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.model.trained_on import TrainedOn


class Known(nn.Module):
    """Logits that the images say themselves: the first values of their first row."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.zero = classes, nn.Parameter(torch.zeros(()))

    def forward(self, images):
        assert not self.training
        return images[:, 0, 0, : self.classes] + self.zero


def test_scores_are_those_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, 1, 8, 8, generator=generator), torch.randint(5, (40,), generator=generator)
    model = Known(5).train()
    scores = evaluate(model, DataLoader(TensorDataset(images, labels), batch_size=7))
    logits = images[:, 0, 0, :5].double().numpy()
    assert scores["top1"] == pytest.approx((logits.argmax(1) == labels.numpy()).mean())
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert scores["loss"] == pytest.approx(-log_p[np.arange(40), labels].mean(), rel=1e-5)
    assert scores["num_images"] == 40 and model.training, "its mode is as before"


def test_a_prepared_data_set_is_scored_on_its_test_split(digits):
    model = Known(10)
    images, labels = digits.split("test")
    first = (images[:][:, 0, :10, 0] / 255 - digits.mean[0]) / digits.std[0]
    log_p = first - np.log(np.exp(first).sum(1, keepdims=True))
    scores = evaluate(model, digits)
    assert scores["loss"] == pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), rel=1e-5)
    assert scores["num_images"] == digits.counts["test"]


@pytest.mark.parametrize("model", [Known(7), "vit"])
def test_a_model_for_other_classes_is_told_in_one_line(digits, tiny_config, model):
    with pytest.raises(UserError, match="7 classes"):
        evaluate(ViT(tiny_config(num_classes=7)) if model == "vit" else model, digits)


def test_outputs_that_are_not_finite_are_told(digits):
    class NaN(Known):
        def forward(self, images):
            return super().forward(images) * torch.nan

    with pytest.raises(UserError, match="not finite"):
        evaluate(NaN(10), digits)


def test_predictions_have_names_where_they_are_known():
    images = torch.zeros(3, 1, 4, 4)
    images[:, 0, 0, :3] = 2 * torch.eye(3)[[1, 0, 2]]
    model = Known(3)
    table = predict(model, images, batch_size=2)
    expected = np.exp(2) / (np.exp(2) + 2)
    assert table["class"].tolist() == [1, 0, 2] and np.allclose(table["probability"], expected)
    model.trained_on = TrainedOn(classes=("cat", "dog", "owl"))
    assert predict(model, images)["class"].tolist() == ["dog", "cat", "owl"]


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_size_that_is_none_is_told_in_one_line(digits, batch_size):
    for call in (lambda: evaluate(Known(10), digits, batch_size=batch_size),
                 lambda: predict(Known(10), torch.zeros(1, 1, 10, 10), batch_size=batch_size)):  # fmt: skip
        with pytest.raises(UserError, match=f"^batch_size={batch_size}: expected a whole number from 1$"):
            call()


def test_names_of_another_number_of_classes_are_told_in_one_line():
    model = Known(3)
    model.trained_on = TrainedOn(classes=("cat", "dog"))
    with pytest.raises(UserError, match="tells 3 classes apart, and has names of 2"):
        predict(model, torch.zeros(1, 1, 4, 4))


def test_any_model_that_knows_its_classes_and_normalisation_is_scored_by_them(digits, capsys):
    model, reference = Known(10), Known(10)
    model.trained_on = TrainedOn(classes=digits.classes, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = evaluate(reference, replace(digits, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    assert evaluate(model, digits) == expected != evaluate(reference, digits)
    assert "normalised by the model's own mean and deviation" in capsys.readouterr().err
    model.trained_on = TrainedOn(classes=digits.classes[::-1])
    with pytest.raises(UserError, match="in another order"):
        evaluate(model, digits)


def test_uint8_images_and_files_are_normalised_as_the_data_set_says(digits, tmp_path):
    from PIL import Image

    images, _ = digits.split("test")
    first = (images[:4][:, 0, :10, 0] / 255 - digits.mean[0]) / digits.std[0]
    expected = [digits.classes[i] for i in first.argmax(1)]
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image in zip(paths, images[:4], strict=True):
        Image.fromarray(image).save(path)
    for given in (images[:4], torch.from_numpy(images[:4]), paths, [str(path) for path in paths]):
        assert predict(Known(10), given, digits)["class"].tolist() == expected


def test_a_vit_reads_files_as_it_was_trained(digits, trained, tmp_path):
    from PIL import Image

    from effvit import load_model, visualize_attention

    images, _ = digits.split("test")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images[:3], strict=True):
        Image.fromarray(image).save(path)
    model = load_model(trained / "run")
    assert predict(model, paths).equals(predict(model, images[:3], digits))
    assert len(visualize_attention(model, paths).axes) == len(visualize_attention(model, images[:3]).axes)
    model.trained_on = TrainedOn()
    with pytest.raises(UserError, match="does not know how its images were normalised"):
        predict(model, paths)
    odd = ViT(ViTConfig(image_size=(8, 16)))
    odd.trained_on = TrainedOn(mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(UserError, match="takes images of 8 x 16 pixels and 3 channels; files are read as squares"):
        predict(odd, paths)


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "images: uint8, which the model takes normalised; give data="),
        (np.zeros((8, 8, 3), np.uint8), r"images: got uint8 \(8, 8, 3\), expected uint8 \(n, height, width, 3\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"images: got int64 \(2, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "images: there are none"),
        (["a.png"], "images: files are read at the size of a data set's images; give data="),
        (None, "images: got NoneType"),
        ("photo.jpg", "^images: got str, expected .*, or a list of image files$"),
        ([], "^images: there are none; expected .*, or a list of image files$"),
        (torch.full((2, 3, 8, 8), torch.nan), "^images: have numbers that are not finite$"),
        (np.full((2, 3, 8, 8), np.inf), "^images: have numbers that are not finite$"),
    ],
)
def test_images_that_are_none_are_told_in_one_line(images, line):
    with pytest.raises(UserError, match=line):
        predict(Known(3), images)


def test_outputs_that_are_not_finite_name_no_class():
    with pytest.raises(UserError, match=r"^the model's outputs are not finite numbers$"):
        predict(Known(3), torch.full((2, 3, 8, 8), torch.finfo(torch.float64).max, dtype=torch.float64))


@pytest.mark.parametrize("use", [evaluate, predict])
def test_what_is_no_model_is_told_in_one_line(use):
    with pytest.raises(UserError, match=r"^model: got NoneType, expected a torch.nn.Module$"):
        use(None, torch.zeros(2, 3, 8, 8))


def test_data_are_prepared_and_opened_again(tmp_path, digits):
    prepared = prepare_data("digits", str(tmp_path / "digits"), image_size=16)
    opened = open_data(str(tmp_path / "digits"))
    assert isinstance(opened, PreparedDataset) and prepared.counts == opened.counts == digits.counts
    assert np.array_equal(opened.split("train")[0][:5], digits.split("train")[0][:5])
    with pytest.raises(UserError, match="expected one of digits, cifar10"):
        prepare_data("digit", tmp_path / "other")
    with pytest.raises(UserError, match="not a prepared data set"):
        open_data(tmp_path / "other")
