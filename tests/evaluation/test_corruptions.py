import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

from effvit.data.loading.transforms import to_float
from effvit.errors import UserError
from effvit.evaluation.corruptions import score_corruptions
from effvit.model.checkpoint import load_model


@pytest.fixture
def model(trained):
    return load_model(trained / "run")


def right(model, digits, pixels, labels):
    with torch.no_grad():
        logits = model(to_float(torch.from_numpy(pixels), digits.mean, digits.std))
    return (logits.argmax(1).numpy() == labels).mean()


def write_corruptions(folder, digits, **images):
    """Arrays of the first 40 test images at five severities, as CIFAR-10-C has them."""
    folder.mkdir()
    pixels, labels = (array[:40] for array in digits.split("test"))
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    parts = [np.clip(pixels + 20 * level * noise, 0, 255).astype(np.uint8) for level in range(5)]
    for name, change in images.items():
        np.save(folder / f"{name}.npy", np.concatenate([change(part) for part in parts]))
    return parts, labels


def test_each_corruption_is_scored_at_each_severity(model, digits, tmp_path):
    parts, labels = write_corruptions(tmp_path / "c", digits, noise=lambda x: x, dark=lambda x: x // 2)
    table = score_corruptions(model, digits, tmp_path / "c", batch_size=16)
    assert table["corruption"].tolist() == ["dark"] * 5 + ["noise"] * 5 and set(table["num_images"]) == {40}
    for name, change in (("noise", lambda x: x), ("dark", lambda x: x // 2)):
        expected = [right(model, digits, change(part), labels) for part in parts]
        assert table[table["corruption"] == name]["top1"].tolist() == pytest.approx(expected)


def test_images_of_another_size_are_resized(model, digits, tmp_path):
    double = lambda x: x.repeat(2, axis=1).repeat(2, axis=2)  # noqa: E731
    parts, labels = write_corruptions(tmp_path / "c", digits, large=double)
    table = score_corruptions(model, digits, tmp_path / "c", batch_size=16)
    side = digits.image_size
    fitted = [
        np.asarray(ImageOps.fit(Image.fromarray(x), (side, side), Image.Resampling.BICUBIC)) for x in double(parts[0])
    ]
    assert table["top1"][0] == pytest.approx(right(model, digits, np.stack(fitted), labels))


def test_other_labels_make_one_severity(model, digits, tmp_path):
    write_corruptions(tmp_path / "c", digits, noise=lambda x: x)
    labels = np.load(tmp_path / "c" / "labels.npy")
    np.save(tmp_path / "c" / "labels.npy", np.random.default_rng(0).permutation(labels))
    assert score_corruptions(model, digits, tmp_path / "c", batch_size=64)["num_images"].tolist() == [200]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels", np.full(200, 10), r"labels\.npy: has labels 10 to 10, the model 0 to 9"),
        ("labels", np.zeros((200, 1), int), r"labels\.npy: int64 \(200, 1\), expected whole numbers"),
        ("noise", np.zeros((200, 8, 8, 3)), r"noise\.npy: float64 .*, expected uint8 \(200, H, W, 3\)"),
        ("noise", np.zeros((199, 8, 8, 3), np.uint8), r"noise\.npy: uint8 \(199, 8, 8, 3\), expected"),
        ("noise", np.array([{}]), r"noise\.npy: damaged or not an array"),
    ],
)
def test_arrays_that_do_not_fit_are_named(model, digits, tmp_path, name, array, message):
    write_corruptions(tmp_path / "c", digits, noise=lambda x: x)
    np.save(tmp_path / "c" / f"{name}.npy", array)
    with pytest.raises(UserError, match=message):
        score_corruptions(model, digits, tmp_path / "c", batch_size=64)


def test_folder_of_something_else_is_named(model, digits, tmp_path):
    with pytest.raises(UserError, match=r"expected labels\.npy and files of images such as gaussian_noise\.npy"):
        score_corruptions(model, digits, tmp_path, batch_size=64)


def test_evaluate_writes_them(effvit, trained, digits_dir, digits, tmp_path):
    write_corruptions(tmp_path / "c", digits, noise=lambda x: x)
    options = ("--model-dir", trained / "run", "--dataset-dir", digits_dir, "--output-dir", tmp_path / "out")
    outcome = effvit("evaluate", *options, "--corruptions", tmp_path / "c")
    table = pd.read_csv(tmp_path / "out" / "corruptions.csv")
    assert outcome.code == 0 and f"mean top-1 under 1 corruptions: {table['top1'].mean():.2%}" in outcome.out
