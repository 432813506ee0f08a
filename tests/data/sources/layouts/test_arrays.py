"""MedMNIST's .npz, checked against NumPy."""

import io

import numpy as np
import pytest

from effvit.data.preparing import prepare
from effvit.data.sources.folder import folder
from effvit.errors import UserError

RNG = np.random.default_rng(0)


def medmnist(path, shape=(28, 28), prefixes=("train", "val", "test"), classes=3, **changes):
    found = {}
    for prefix, count in zip(prefixes, (30, 9, 12), strict=False):
        found[f"{prefix}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        found[f"{prefix}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    found |= changes
    np.savez_compressed(path, **found)
    return found


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3)])
def test_arrays_are_those_of_numpy(tmp_path, shape):
    truth = medmnist(tmp_path / "pathmnist.npz", shape)
    for root in (tmp_path / "pathmnist.npz", tmp_path):
        data = prepare("folder", root, 28, tmp_path.parent / f"{tmp_path.name}-out")
        assert data.counts == {"train": 30, "validation": 9, "test": 12} and data.classes == ("0", "1", "2")
        for split, prefix in (("train", "train"), ("validation", "val"), ("test", "test")):
            images, labels = data.split(split)
            expected = truth[f"{prefix}_images"].reshape(len(labels), 28, 28, -1)
            assert np.array_equal(images[:], np.broadcast_to(expected, (len(labels), 28, 28, 3)))
            assert np.array_equal(labels, truth[f"{prefix}_labels"].ravel())
        grey = {} if shape[-1] == 3 else {"grayscale converted to RGB": 39}
        assert data.notes["train"] == grey


def test_keras_names_and_another_size(tmp_path):
    truth = {}
    for part, count in (("train", 20), ("test", 10)):
        truth |= {f"x_{part}": RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8), f"y_{part}": np.arange(count) % 2}
    np.savez(tmp_path / "mnist.npz", **truth)
    data = prepare("folder", tmp_path / "mnist.npz", 14, tmp_path / "out" / "x")
    assert data.counts == {"train": 18, "validation": 2, "test": 10} and data.notes["test"]["resized"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.zeros((30, 14), np.uint8)}, r"train_labels has 14 labels for each image \(multi-label\)"),
        ({"train_labels": np.zeros(30)}, "train_labels is float64"),
        ({"train_labels": np.zeros((29, 1), np.uint8)}, "train_images has 30 images for 29 labels"),
        ({"test_images": np.zeros((12, 28, 28))}, r"test_images is float64 \(12, 28, 28\), expected uint8"),
        ({"test_images": np.zeros((12, 28, 28, 28), np.uint8)}, "expected uint8"),
        ({"val_images": np.array([{}] * 9)}, "holds objects"),
        ({"train_images": np.asfortranarray(np.zeros((30, 28, 28), np.uint8))}, "Fortran order"),
    ],
)
def test_what_is_wrong_with_an_array_is_named(tmp_path, changes, message):
    medmnist(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError, match=rf"a\.npz: .*{message}"):
        folder(tmp_path, 8)


def test_npz_of_something_else_or_damaged_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros(3))
    with pytest.raises(UserError, match=r"a\.npz has the arrays weights; expected train_images"):
        folder(tmp_path, 8)
    medmnist(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:-200])
    with pytest.raises(UserError, match=r"a\.npz: damaged or not an \.npz"):
        folder(tmp_path, 8)
    content = bytearray(whole)
    content[300:400] = b"\xff" * 100
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: damaged"):
        list(folder(tmp_path, 8).train.images)
    (tmp_path / "b.npz").write_bytes(whole)
    with pytest.raises(UserError, match=r"holds 2 \.npz files; name one as root, as root=.*a\.npz"):
        folder(tmp_path, 8)


def test_array_cut_short_inside_the_archive_is_named(tmp_path):
    import zipfile

    buffer = io.BytesIO()
    np.save(buffer, np.zeros((30, 28, 28), np.uint8))
    truth = medmnist(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name in truth:
            whole = io.BytesIO()
            np.save(whole, truth[name])
            content = whole.getvalue()
            archive.writestr(f"{name}.npy", content[:-100] if name == "test_images" else content)
    with pytest.raises(UserError, match=r"b\.npz: test_images is cut short"):
        list(folder(tmp_path / "b.npz", 8).test.images)


def test_part_without_labels_is_said(tmp_path):
    medmnist(tmp_path / "a.npz")
    arrays = dict(np.load(tmp_path / "a.npz"))
    del arrays["test_labels"]
    np.savez(tmp_path / "a.npz", **arrays)
    source = folder(tmp_path, 8)
    assert len(source.test.labels) == 9 and "test_images not read (no test_labels)" in source.description
    for name in ("val_images", "val_labels"):
        del arrays[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=r"no test or validation part with labels .*; add it$"):
        folder(tmp_path, 8)


@pytest.mark.parametrize("shape", [(30, 0, 28), (30, 0, 0)])
def test_images_without_pixels_are_refused(tmp_path, shape):
    medmnist(tmp_path / "a.npz", train_images=np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"train_images is uint8 \(30, 0, (28|0)\), expected uint8"):
        folder(tmp_path, 8)


def test_flipped_bytes_are_one_line_or_change_nothing_that_is_checked(tmp_path):
    path = tmp_path / "a.npz"
    medmnist(path, shape=(2, 2))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for at in rng.integers(len(whole), size=2):
            content[at] = rng.integers(256)
        path.write_bytes(content)
        try:
            list(folder(path, 8).train.images)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_encrypted_archive_is_named(tmp_path):
    medmnist(tmp_path / "a.npz")
    content = bytearray((tmp_path / "a.npz").read_bytes())
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + at] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: damaged or not an array .*encrypted"):
        folder(tmp_path, 8)
