"""Images and a CSV, checked against the csv module."""

import csv

import image_sets as sets
import pytest

from effvit.data.sources.cifar import cifar10
from effvit.data.sources.folder import folder
from effvit.data.sources.layout import Choices
from effvit.errors import UserError

PICTURES = sets.make_pictures(train=4, test=2)
PNG = PICTURES["train"][0].content
SPLIT = Choices(test_share=0.25)


def labels_by_name(source):
    return {
        split.images.name(row): source.classes[split.labels[row]]
        for split in (source.train, source.test)
        for row in range(len(split.labels))
    }


def by_csv(path, folder, suffix=".png"):
    with path.open(newline="") as file:
        return {f"{folder}/{name}{suffix}": label for name, label in list(csv.reader(file))[1:]}


def test_kaggles_cifar_is_read_with_its_labels_and_its_test_part_left_alone(tmp_path):
    classes = [f"c{index}" for index in range(10)]
    rows = [("id", "label"), *((str(number), classes[number % 10]) for number in range(1, 41))]
    for number in range(1, 41):
        sets.write(tmp_path / "train" / f"{number}.png", PNG)
        sets.write(tmp_path / "test" / f"{number}.png", PNG)
    for name, content in (("trainLabels", rows), ("sampleSubmission", [(name, "cat") for name, _ in rows])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(content)
    source = cifar10(tmp_path, 32, Choices(test_share=0.25))
    assert labels_by_name(source) == by_csv(tmp_path / "trainLabels.csv", "train")
    assert source.train.notes == {"images that no CSV names, not read": 40}
    assert len(source.test.labels) == 10 and "trainLabels.csv (columns id and label)" in source.description


def test_labels_of_both_parts_and_names_with_a_suffix(tmp_path):
    root = sets.as_csv(PICTURES, tmp_path, header=("Image", "Class"), suffix=True)
    source = folder(root, 8)
    expected = [by_csv(root / f"{part}Labels.csv", part, "") for part in ("train", "test")]
    assert labels_by_name(source) == expected[0] | expected[1] and len(source.test.labels) == 6


def test_csv_in_the_folder_of_its_images(tmp_path):
    for part, found in PICTURES.items():
        rows = ["file_name,label", *(f"{picture.name},{picture.label}" for picture in found)]
        sets.write(tmp_path / part / "metadata.csv", "\n".join(rows))
        for picture in found:
            sets.write(tmp_path / part / picture.name, picture.content)
    source = folder(tmp_path, 8)
    assert (len(source.train.labels), len(source.test.labels)) == (12, 6)


def test_columns_named_come_before_folders_of_classes(tmp_path):
    sets.as_tree(PICTURES, tmp_path)
    rows = ["where,colour,label"]
    for part, found in PICTURES.items():
        rows += [f"{part}/{p.label}/{p.name},{('red', 'blue')[i % 2]},x" for i, p in enumerate(found)]
    sets.write(tmp_path / "all.csv", "\n".join(rows))
    assert folder(tmp_path, 8).classes == ("ant", "bee", "cat")
    source = folder(tmp_path, 8, Choices(test_share=0.5, image_column="where", label_column="colour"))
    assert source.classes == ("blue", "red") and len(source.train.labels) + len(source.test.labels) == 18


def test_labels_that_are_numbers_are_in_their_order(tmp_path):
    rows = ["id,label"]
    for number in range(30):
        sets.write(tmp_path / "images" / f"{number}.png", PNG)
        rows.append(f"{number},{(2, 10, 9)[number % 3]}")
    sets.write(tmp_path / "labels.csv", "\n".join(rows))
    assert folder(tmp_path, 8, SPLIT).classes == ("2", "9", "10")


@pytest.mark.parametrize(
    ("content", "choices", "message"),
    [
        ("id,label\n0,a\n1,b\n7,a\n", SPLIT, r"labels\.csv: line 4 names '7' in the column 'id', .* \(1 of 3 rows\)"),
        ("id,label\n0,a\n1\n", SPLIT, r"labels\.csv: line 3 has 1 fields for 2 columns"),
        ("id,label\n0,a\n1,\n", SPLIT, r"labels\.csv: line 3 has no class in the column 'label'"),
        ("id,label\n0,a\n0,b\n", SPLIT, r"images/0\.png has several classes, as with multi-label images"),
        ("id,label\n0,a\n0,a\n", SPLIT, r"images/0\.png has several rows"),
        ("id,label\n", SPLIT, r"labels\.csv: has no rows"),
        ("x,y\n0,a\n", SPLIT, r"labels\.csv has the columns x, y; name those .* image_column=NAME and label_column"),
        ("id,label\n0,a\n1,b\n", Choices(label_column="lable"), r"label_column=lable: .* \(did you mean label\?\)"),
        ("id,label,split\n0,a,train\n1,b,extra\n", SPLIT, r"'extra' in the column 'split': expected train, valid"),
        ("id,label\n0,a\n1,b\n2,a\n3,b", Choices(), r"2 classes with 4 images and no split .*; add test_share=0\.2"),
        ("id,label\n0,a\n1,b\n", SPLIT, "class 'a' has 1 images, expected at least 3"),
        (b"\xff\xfe,label\n", SPLIT, r"labels\.csv: expected text in UTF-8"),
        ('id,label\n"0,a\n', SPLIT, r"labels\.csv: (line 2 has 1 fields|not a CSV)"),
    ],
)
def test_what_is_wrong_with_a_csv_is_named(tmp_path, content, choices, message):
    for number in range(4):
        sets.write(tmp_path / "images" / f"{number}.png", PNG)
    sets.write(tmp_path / "labels.csv", content)
    with pytest.raises(UserError, match=message):
        folder(tmp_path, 8, choices)


def test_two_csvs_of_one_part_are_refused(tmp_path):
    sets.as_csv(PICTURES, tmp_path)
    (tmp_path / "train_more.csv").write_bytes((tmp_path / "trainLabels.csv").read_bytes())
    with pytest.raises(UserError, match=r"trainLabels\.csv .*are there, expected one CSV for each part"):
        folder(tmp_path, 8)
