import os

import numpy as np
import pytest
from PIL import Image

from effvit.data.folder import folder
from effvit.errors import UserError

RNG = np.random.default_rng(0)


def make_image(path, shape=(8, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for index in range(3):
                make_image(tmp_path / split / name / f"{index}.png")
    return tmp_path


def read(root):
    source = folder(root, 8)
    return source, [list(split.images) for split in (source.train, source.test)]


def test_classes_are_folders_in_sorted_order_and_images_follow_their_names(tree):
    extra = make_image(tree / "train" / "ant" / "b.png"), make_image(tree / "train" / "ant" / "a.png")
    make_image(tree / "test" / "ant" / "a.png")
    source, (train, test) = read(tree)
    assert source.classes == ("ant", "cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(train[0], extra[1]) and np.array_equal(train[1], extra[0])
    assert len(test) == len(source.test.labels) == 7


def test_litter_is_ignored_with_a_count_and_conversions_are_counted(tree):
    for name in ("train/.DS_Store", "train/cat/.DS_Store", "train/cat/Thumbs.db", "train/dog/desktop.ini"):
        (tree / name).write_bytes(b"litter")
    (tree / "README.txt").write_text("beside train and test, where nothing is read")
    make_image(tree / "train" / "dog" / "grey.png", (8, 8))
    make_image(tree / "test" / "dog" / "big.png", (20, 16, 3))
    source, _ = read(tree)
    assert source.train.notes == {"stray files ignored": 4, "grayscale converted to RGB": 1}
    assert source.test.notes == {"resized": 1}


def empty(directory):
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: (empty(t / "test/dog"), (t / "test/dog").rmdir()), "class 'dog' is missing from test"),
        (lambda t: make_image(t / "test/emu/0.png"), "class 'emu' is missing from train"),
        (lambda t: empty(t / "train/cat"), "class 'cat' has no images"),
        (lambda t: (empty(t / "test/cat"), (t / "test/cat/.DS_Store").touch()), "class 'cat' has no images"),
        (lambda t: (t / "train/cat/notes.txt").write_text("x"), r"notes\.txt: not an image"),
        (lambda t: (t / "train/labels.csv").write_text("x"), r"labels\.csv: expected only folders of classes"),
        (lambda t: (t / "train/cat/more").mkdir(), "more: expected image files"),
        (lambda t: os.mkfifo(t / "train/cat/pipe.png"), r"pipe\.png: expected image files"),
        (lambda t: (t / "train/cat").rename(t / "train/c\udcff"), "the name of a class must be valid UTF-8"),
        (lambda t: (t / "test").rename(t / "val"), "found no test/"),
    ],
)
def test_what_is_wrong_with_a_tree_is_named(tree, spoil, message):
    spoil(tree)
    with pytest.raises(UserError, match=message):
        read(tree)


def test_single_class_is_refused(tmp_path):
    for split in ("train", "test"):
        make_image(tmp_path / split / "only" / "0.png")
    with pytest.raises(UserError, match="expected at least 2 classes, found 1"):
        read(tmp_path)


def test_truncated_jpeg_is_named(tree):
    path = tree / "train" / "cat" / "cut.jpg"
    make_image(path, (64, 64, 3))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cut\.jpg: damaged image"):
        read(tree)
