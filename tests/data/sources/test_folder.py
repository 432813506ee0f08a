import io
import os

import numpy as np
import pytest
from PIL import Image

from effvit.data.sources.folder import folder
from effvit.data.sources.images import FORMATS_TEXT, read_square
from effvit.data.sources.layout import Choices, read_class_list
from effvit.errors import UserError

OTHERS = f"files that are no {FORMATS_TEXT} ignored"
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
    return source, [
        [np.asarray(read_square(split.images.read(i), split.images.name(i), 8)[0]) for i in range(len(split.images))]
        for split in (source.train, source.test)
    ]


def test_classes_are_folders_in_sorted_order_and_images_follow_their_names(tree):
    extra = make_image(tree / "train" / "ant" / "b.png"), make_image(tree / "train" / "ant" / "a.png")
    make_image(tree / "test" / "ant" / "a.png")
    source, (train, test) = read(tree)
    assert source.classes == ("ant", "cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(train[0], extra[1]) and np.array_equal(train[1], extra[0])
    assert len(test) == len(source.test.labels) == 7


def test_litter_and_files_of_another_kind_are_ignored_with_a_count(tree):
    for name in ("train/.DS_Store", "train/cat/.DS_Store", "train/cat/Thumbs.db", "train/dog/desktop.ini"):
        (tree / name).write_bytes(b"litter")
    (tree / "train/cat/notes.txt").write_text("no image")
    (tree / "test/labels.csv").write_text("beside the classes")
    (tree / "README.txt").write_text("beside train and test, where nothing is read")
    source, (train, test) = read(tree)
    assert source.train.notes == {"stray files ignored": 4, OTHERS: 1}
    assert source.test.notes == {"stray files ignored": 1}
    assert len(train) == len(test) == 6


def test_images_of_formats_that_are_not_read_are_counted_apart(tree):
    Image.new("RGB", (8, 8)).save(tree / "train/cat/9.ico")
    Image.new("RGB", (8, 8)).save(tree / "train/dog/9.jp2")
    source, (train, _) = read(tree)
    assert source.train.notes == {OTHERS: 2} and len(train) == 6


def test_images_without_folders_of_classes_are_named_with_their_place(tree):
    for name in ("a.png", "b.png"):
        make_image(tree / "val" / name)
    (tree / "test").rename(tree.parent / "away")
    with pytest.raises(UserError, match="val/: expected a folder for each class, with its images; found 2 files"):
        read(tree)
    for path in (tree / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="val/: expected a folder for each class, with its images; found nothing"):
        read(tree)


def test_text_that_begins_like_a_bitmap_is_no_image(tree):
    (tree / "train/cat/notes.txt").write_text("BMW is a maker of cars")
    source, (train, _) = read(tree)
    assert len(train) == 6 and source.train.notes == {OTHERS: 1}


def test_image_of_too_many_pixels_is_named_whatever_its_suffix(tree):
    Image.new("1", (40000, 8)).save(tree / "train/cat/7.bmp")
    content = bytearray((tree / "train/cat/7.bmp").read_bytes())
    content[22:26] = (40000).to_bytes(4, "little")  # its height
    (tree / "train/cat/7.bmp").unlink()
    (tree / "train/cat/7").write_bytes(content)
    with pytest.raises(UserError, match=r"cat/7: more than .* pixels"):
        read(tree)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [16, 60, 200])
def test_what_is_left_of_an_image_is_named_whatever_its_suffix(tree, format, keep):
    whole = io.BytesIO()
    Image.effect_noise((32, 32), 90).convert("RGB").save(whole, format)
    part = tree / "train/cat/7.jpg.part"
    part.write_bytes(whole.getvalue()[:keep])
    with pytest.raises(UserError, match=r"7\.jpg\.part: (damaged|not an) image"):
        read(tree)


def test_image_under_any_suffix_is_an_image(tree):
    (tree / "train/cat/0.png").rename(tree / "train/cat/0.dat")
    (tree / "train/cat/1.png").rename(tree / "train/cat/1")
    source, (train, _) = read(tree)
    assert len(train) == 6 and source.train.notes == {}


def test_val_is_the_test_split_where_there_is_no_test(tree):
    (tree / "test").rename(tree / "val")
    source, (_, test) = read(tree)
    assert len(test) == 6 and "val/<class>" in source.description
    make_image(tree / "test" / "cat" / "0.png")
    make_image(tree / "test" / "dog" / "0.png")
    assert len(read(tree)[1][1]) == 2


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_part_of_ones_own_is_the_validation_split(tree, name):
    assert folder(tree, 8).validation is None
    for label in ("cat", "dog"):
        make_image(tree / name / label / "v.png")
    source, (train, test) = read(tree)
    assert source.description == f"folder tree train/<class>, {name}/<class>, test/<class>"
    assert (len(train), len(test)) == (8, 6) and source.validation.tolist() == [6, 7]
    assert [source.train.images.name(row) for row in source.validation] == [f"{name}/{c}/v.png" for c in ("cat", "dog")]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 1]


def test_classes_can_be_chosen_by_a_file(tree, tmp_path):
    for split in ("train", "test"):
        make_image(tree / split / "ant lion" / "0.png")
    (tmp_path / "list").write_text("dog\n\nant lion\n")
    source = folder(tree, 8, Choices(tmp_path / "list"))
    assert source.classes == ("ant lion", "dog") and source.train.labels.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\nemu\n", "class 'emu' is wanted"),
        (b"cat\ncat\n", "named 2 times"),
        (b"\n", "found none"),
        (b"\xff", "text"),
    ],
)
def test_wrong_file_of_classes_is_told(tree, tmp_path, content, message):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=message):
        folder(tree, 8, Choices(tmp_path / "list"))


def test_order_of_a_class_list_is_kept_and_blanks_and_a_byte_order_mark_are_not(tmp_path):
    (tmp_path / "list").write_text("\ufeff b \n\na\n", encoding="utf-8")
    assert read_class_list(tmp_path / "list") == ("b", "a")


def others(directory):
    empty(directory)
    for name in ("scan.pdf", "notes.txt"):
        (directory / name).write_bytes(b"II*\0 and more")


def empty(directory):
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: (empty(t / "test/dog"), (t / "test/dog").rmdir()), "class 'dog' is missing from test"),
        (lambda t: make_image(t / "test/emu/0.png"), "class 'emu' is missing from train"),
        (lambda t: empty(t / "train/cat"), "class 'cat' has no images .JPEG, PNG, .*/train/cat is empty"),
        (lambda t: others(t / "train/cat"), "class 'cat' has no images .*/train/cat has 2 other files"),
        (lambda t: (empty(t / "test/cat"), (t / "test/cat/.DS_Store").touch()), "class 'cat' has no images"),
        (lambda t: (t / "train/cat/empty.jpg").touch(), r"empty\.jpg: not an image"),
        (lambda t: os.mkfifo(t / "train/cat/pipe.png"), r"pipe\.png: expected image files"),
        (lambda t: (t / "train/cat").rename(t / "train/c\udcff"), "the name of a class must be valid UTF-8"),
        (lambda t: (t / "test").rename(t / "tests"), "found train/ and no test/ or val/ .is tests/ meant.."),
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
