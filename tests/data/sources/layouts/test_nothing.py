"""Where nothing is recognised, the message says what is there and what to type."""

import image_sets as sets
import pytest

from effvit.data.sources.folder import folder
from effvit.data.sources.layout import Choices
from effvit.errors import UserError

PICTURES = sets.make_pictures(train=3, test=2)
PNG = PICTURES["train"][0].content


def told(root, choices=None):
    with pytest.raises(UserError) as caught:
        folder(root, 8, choices or Choices())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_root(tmp_path):
    (tmp_path / "photos").mkdir()
    assert told(tmp_path / "photo") == f"root={tmp_path}/photo: no such folder or file (did you mean photos?)"
    assert told(tmp_path / "a" / "b").endswith(f"no such folder or file; {tmp_path}/a is not there either")


@pytest.mark.parametrize(
    ("name", "command"), [("x.tar.gz", "tar -xf"), ("x.tgz", "tar -xf"), ("x.tar.xz", "tar -xf"), ("x.7z", "7z x")]
)
def test_compressed_archive(tmp_path, name, command):
    root = sets.write(tmp_path / name, b"any")
    says = (
        f"a compressed archive, which cannot be read in place; unpack it ({command} {name}) and name the folder as root"
    )
    assert told(root) == f"root={root}: {says}"


def test_file_of_another_kind(tmp_path):
    root = sets.write(tmp_path / "notes.txt", b"any")
    assert told(root) == f"root={root}: a file; expected a folder, or a .zip, .tar, .npz, .parquet or .arrow file"


def test_archives_inside(tmp_path):
    sets.as_zip(PICTURES, tmp_path / "photos.zip")
    assert told(tmp_path).endswith(f"holds the archive photos.zip; name it as root, as root={tmp_path}/photos.zip")
    sets.write(tmp_path / "test.tar.gz", b"any")
    assert told(tmp_path).endswith(
        "holds 2 archives, photos.zip, test.tar.gz; "
        "unpack them there (unzip photos.zip, tar -xf test.tar.gz) and run again"
    )


def test_table_in_an_archive(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train.parquet", b"any")
    assert "train.parquet in an archive is not read in place; unpack it" in told(tmp_path / "a.zip")


def test_no_split(tmp_path):
    root = sets.as_tree(PICTURES, tmp_path) / "train"
    assert told(root).endswith(
        "(folder tree <class>); add test_share=0.2 to hold out a fifth of each class as test split"
    )


def test_one_level_down_among_others(tmp_path):
    for name in ("a", "b"):
        sets.as_tree(PICTURES, tmp_path / name)
    assert told(tmp_path) == f"root={tmp_path}: no train/ here, but in a/, b/; name one as root, as root={tmp_path}/a"


def test_images_without_labels(tmp_path):
    sets.write(tmp_path / "1.png", PNG)
    assert told(tmp_path).startswith(
        f"root={tmp_path}: 1 images without labels; sort them into folders of classes, or add a"
    )
    (tmp_path / "1.png").rename(sets.write(tmp_path / "images" / "0.png", PNG).with_name("1.png"))
    assert told(tmp_path).startswith(f"root={tmp_path}: images/ in it: 2 images without labels")


def test_train_without_classes(tmp_path):
    sets.write(tmp_path / "train" / "1.png", PNG)
    sets.write(tmp_path / "test" / "1.png", PNG)
    assert "train/ has 1 files and no folders of classes; sort them into train/<class>/, or add a CSV" in told(tmp_path)


def test_no_train(tmp_path):
    root = sets.as_tree(PICTURES, tmp_path, [("train", "trian")])
    assert "found test/ and no train/ (is trian/ meant?)" in told(root)


def test_empty_folder_and_something_else(tmp_path):
    assert told(tmp_path).startswith(f"root={tmp_path}: is empty; expected train/<class>/ and test/<class>/")
    for name in "abcde":
        sets.write(tmp_path / f"{name}.tex", b"any")
    assert told(tmp_path).startswith(f"root={tmp_path}: found a.tex, b.tex, c.tex and 2 more; expected train/<class>/")


def test_archives_in_an_archive(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images.zip", b"any")
    assert told(tmp_path / "a.zip").endswith(
        "holds images.zip, and archives in an archive are not read in place; unpack both"
    )


def test_folder_without_images_among_folders_of_classes(tmp_path):
    root = sets.as_tree(PICTURES, tmp_path) / "train"
    (root / "dog").mkdir()
    assert told(root) == (
        f"root={root}: 3 folders have images (ant/, bee/, cat/), and dog/ has none; each must have some to be a class, "
        "so move it away or fill it"
    )


def test_class_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        sets.write(tmp_path / name / "1.png", PNG)
    assert "train/ has no folders of classes, and bus/, car/ have images; if train is a class" in told(tmp_path)


def test_folders_deeper_than_any_release_are_read_and_a_loop_is_named(tmp_path):
    sets.as_tree(PICTURES, tmp_path / "a" / "b" / "c" / "d" / "e")
    assert folder(tmp_path, 8).classes == ("ant", "bee", "cat")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").symlink_to(tmp_path / "x")
    assert "folders in folders 16 levels deep; does a link lead back?" in told(tmp_path / "x")


def test_table_without_images(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"file": ["a"], "label": [1]}), tmp_path / "train.parquet")
    says = "train.parquet has no column with images; its columns are file, label; image_column=NAME takes one"
    assert told(tmp_path) == f"root={tmp_path}: {says}"


@pytest.mark.parametrize(
    ("layout", "choices", "says"),
    [
        (sets.as_tree, {"label_column": "x"}, "label_column=x: does nothing for folder tree"),
        (sets.as_tree, {"image_column": "x"}, "image_column=x: does nothing for folder tree"),
        (sets.as_parquet, {"label_level": 3}, "label_level=3: does nothing for Parquet files"),
        (sets.as_webdataset, {"image_column": "x"}, "image_column=x: does nothing for WebDataset"),
        (sets.as_csv, {"label_level": 2}, "label_level=2: does nothing for images and"),
    ],
)
def test_choice_that_does_nothing_is_refused(tmp_path, layout, choices, says):
    assert told(layout(PICTURES, tmp_path / "x"), Choices(**choices)).startswith(says)


def test_level_deeper_than_the_folders(tmp_path):
    root = sets.as_tree(PICTURES, tmp_path)
    assert told(root, Choices(label_level=2)) == f"label_level=2: {root} has no folders 2 levels below train"


def test_share_that_leaves_too_few(tmp_path):
    root = sets.as_tree(PICTURES, tmp_path) / "train"
    assert told(root, Choices(test_share=0.5)).startswith(
        "test_share=0.5: of the 3 images of class 'ant' it leaves 1, expected at least 2 (for train and validation)"
    )
