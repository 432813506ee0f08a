import json
import re

import numpy as np
import pytest

from effvit.data.loading.prepared import PreparedDataset, write_files
from effvit.data.preparing.writer import write_prepared
from effvit.data.sources.base import Source, Split
from effvit.errors import UserError

RNG = np.random.default_rng(0)
LABELS = {"train": np.repeat(np.arange(3), 20), "test": np.repeat(np.arange(3), 4)}
PIXELS = {name: RNG.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8) for name, labels in LABELS.items()}


@pytest.fixture
def directory(tmp_path):
    splits = {name: Split(LABELS[name], PIXELS[name]) for name in LABELS}
    write_prepared(Source("a test", ("a", "b", "c"), **splits), "noise", 8, tmp_path / "prepared")
    return tmp_path / "prepared"


def test_splits_give_back_the_images_and_labels_of_the_source(directory):
    dataset = PreparedDataset.load(directory)
    rows = {"train": dataset.arrays["train_indices"], "validation": dataset.arrays["validation_indices"]}
    for name, stored in (("train", "train"), ("validation", "train"), ("test", "test")):
        images, labels = dataset.split(name)
        chosen = rows.get(name, np.arange(len(LABELS["test"])))
        assert images.shape == (len(images), 8, 8, 3) and len(images) == len(labels) == dataset.counts[name]
        assert np.array_equal(images[:], PIXELS[stored][chosen])
        assert np.array_equal(labels, LABELS[stored][chosen])
    assert set(rows["train"]).isdisjoint(rows["validation"])


def test_rows_are_picked_by_number_slice_and_array(directory):
    images, _ = PreparedDataset.load(directory).split("validation")
    everything = images[:]
    picks = np.array([3, 0, 3])
    assert np.array_equal(images[2], everything[2])
    assert np.array_equal(images[1:4], everything[1:4])
    assert np.array_equal(images[picks], everything[picks])


def test_batches_are_the_rows_asked_for_in_that_order(directory):
    images, _ = PreparedDataset.load(directory).split("train")
    rows = [np.array([5, 0, 5]), np.array([2])]
    for batch, picks in zip(images.batches(rows, seed=3, workers=2), rows, strict=True):
        assert batch.dtype == np.uint8 and np.array_equal(batch, images[picks])


def test_images_stay_on_disk_until_they_are_indexed(directory):
    array = PreparedDataset.load(directory).images["train"]
    assert isinstance(array.base, np.memmap) and not array.flags.writeable


def edit_meta(directory, **changes):
    path = directory / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def objects(directory):
    np.save(directory / "test_labels.npy", np.array([{}] * 12, dtype=object), allow_pickle=True)


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_zip(path):
    np.savez(path.with_suffix(".npz"), labels=np.load(path))
    path.with_suffix(".npz").replace(path)


def with_shape(path, shape):
    """Give the array's header another shape, of no length that its file could have."""
    content = path.read_bytes()
    header = content[10 : 10 + int.from_bytes(content[8:10], "little")]
    changed = re.sub(rb"'shape': \(.*?\)", b"'shape': " + shape, header).strip().ljust(len(header) - 1) + b"\n"
    path.write_bytes(content[:10] + changed + content[10 + len(header) :])


def without_validation(directory):
    np.save(directory / "train_indices.npy", np.arange(60))
    np.save(directory / "validation_indices.npy", np.arange(0))
    edit_meta(directory, counts={"train": 60, "validation": 0, "test": 12})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit_meta(d, image_size=0), r"meta\.json: image_size=0: .* greater than 0"),
        (lambda d: edit_meta(d, image_size=-5), r"meta\.json: image_size=-5: .* greater than 0"),
        (lambda d: edit_meta(d, std=[0.5, 0, 0.5]), r"meta\.json: std\.1=0\.?0?: .* greater than 0"),
        (lambda d: edit_meta(d, std=[0.5, -0.2, 0.5]), r"meta\.json: std\.1=-0\.2: .* greater than 0"),
        (lambda d: edit_meta(d, std=[0.5, 0.5, float("nan")]), r"meta\.json: std\.2=nan: "),
        (lambda d: edit_meta(d, mean=[float("inf"), 0.5, 0.5]), r"meta\.json: mean\.0=inf: "),
        (without_validation, "validation has no images"),
        (lambda d: as_folder(d / "train_images.npy"), r"train_images\.npy: truncated or not an array"),
        (lambda d: as_folder(d / "test_labels.npy"), r"test_labels\.npy: truncated or not an array"),
        (lambda d: edit_meta(d, format_version=2), "format version 2, this effvit reads version 1"),
        (lambda d: edit_meta(d, format_version=None), "format version None"),
        (lambda d: edit_meta(d, mean=[0.5, "x", 0.5]), r"meta\.json: mean\.1='x'"),
        (lambda d: edit_meta(d, image_size=16), "does not fit meta.json"),
        (lambda d: edit_meta(d, classes=["a", "b"]), "labels outside 0 to 1"),
        (lambda d: edit_meta(d, counts={"train": 1, "validation": 1, "test": 1}), "the arrays hold"),
        (lambda d: (d / "meta.json").write_text("{"), r"meta\.json: "),
        (lambda d: (d / "meta.json").write_text("[]"), r"meta\.json: "),
        (lambda d: (d / "train_images.npy").unlink(), r"train_images\.npy: missing"),
        (lambda d: cut(d / "train_images.npy", 5000), r"train_images\.npy: truncated"),
        (lambda d: cut(d / "test_images.npy", 0), r"test_images\.npy: truncated"),
        (lambda d: cut(d / "train_labels.npy", 200), r"train_labels\.npy: truncated"),
        (objects, r"test_labels\.npy: truncated or not an array"),
        (lambda d: as_zip(d / "train_labels.npy"), r"train_labels\.npy: truncated or not an array"),
        (lambda d: with_shape(d / "train_labels.npy", b"(10000000000000,)"), r"train_labels\.npy: truncated or not"),
        (lambda d: with_shape(d / "train_labels.npy", b"(9999999999999999999999,)"), "truncated or not an array"),
        (lambda d: with_shape(d / "test_labels.npy", b"(1, {'"), r"test_labels\.npy: truncated or not an array"),
        (
            lambda d: np.save(d / "test_labels.npy", np.zeros(11, np.int64)),
            "12 images of test but 11 labels",
        ),
        (lambda d: np.save(d / "test_labels.npy", np.full(12, 3)), "labels outside 0 to 2"),
        (lambda d: np.save(d / "test_labels.npy", np.full(12, -1)), "labels outside 0 to 2"),
        (lambda d: np.save(d / "test_labels.npy", np.zeros(12, np.float32)), "float32"),
        (lambda d: np.save(d / "validation_indices.npy", np.array([0, 1], np.int64)), "do not partition"),
    ],
)
def test_unsound_directory_is_refused_in_one_line_with_the_remedy(directory, spoil, message):
    spoil(directory)
    with pytest.raises(UserError, match=message) as caught:
        PreparedDataset.load(directory)
    assert str(directory) in str(caught.value) and "run `effvit prepare` again" in str(caught.value)
    assert "\n" not in str(caught.value)


NAMES = [f"train/{name}/{index}.png" for index, name in enumerate(["a, b", 'quote"d', "two\nlines", "ä"] * 15)]


def test_files_are_those_of_the_images_of_each_split(directory):
    assert PreparedDataset.load(directory).files("test") is None  # as prepared by an earlier version
    write_files(directory / "train_files.csv", NAMES)
    write_files(directory / "test_files.csv", [*"abcdefghijk", "no UTF-8 \udcff"])
    dataset = PreparedDataset.load(directory)
    assert dataset.files("test") == [*"abcdefghijk", r"no UTF-8 \udcff"]
    for split in ("train", "validation"):
        assert dataset.files(split) == [NAMES[row] for row in dataset.arrays[f"{split}_indices"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a list of files"),
        (b"file\na,b\n", "not a list of files"),
        (b"file\n\xff\n", "not a list of files"),
        (b"file\n" + b"a" * 200_000, "not a list of files"),
        (b"file\na\n", "1 files for 12 images"),
        (b"name\n" + b"a\n" * 12, "not a list of files"),
    ],
)
def test_list_of_files_that_does_not_fit_is_refused_when_it_is_read(directory, content, message):
    (directory / "test_files.csv").write_bytes(content)
    dataset = PreparedDataset.load(directory)
    with pytest.raises(UserError, match=rf"test_files\.csv: {message}.*; run `effvit prepare` again"):
        dataset.files("test")


@pytest.mark.parametrize("name", ["", "absent"])
def test_directory_that_was_never_prepared_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="not a prepared data set"):
        PreparedDataset.load(tmp_path / name)


def test_unknown_split_is_refused(directory):
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        PreparedDataset.load(directory).split("val")


def test_batches_are_the_rows_asked_for(digits):
    images, _ = digits.split("validation")
    rows = [np.array([3, 0, 3]), np.array([], dtype=np.int64), np.array([len(images) - 1])]
    for index, batch in zip(rows, images.batches(rows, seed=1, workers=2), strict=True):
        assert np.array_equal(batch, images[index]) and batch.dtype == np.uint8
