"""Images and a CSV, checked against the csv module."""

import csv
import unicodedata

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
        ("id,label\n\n7,a\n", SPLIT, r"labels\.csv: line 3 names '7'"),
        ("id,label\n0,a\n1,b\n7,a\n", SPLIT, r"labels\.csv: line 4 names '7' in the column 'id', .* \(1 of 3 rows\)"),
        ("id,label\n0,a\n1\n", SPLIT, r"labels\.csv: line 3 has 1 fields for 2 columns"),
        ("id,label\n\n0,a\n\n1,\n", SPLIT, r"labels\.csv: line 5 has no class"),
        ("id,label\n0,1\n1,0\n2,-1\n", SPLIT, r"labels\.csv: line 4 has no class"),
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


def table(root, name, rows, images="images", suffix=".png"):
    """A CSV, and an image of its own content for each row's first field."""
    sets.write(root / name, "\n".join(rows))
    for row in rows[1:]:
        stem = row.split(",")[0].removesuffix(suffix)
        sets.write(root / images / f"{stem}{suffix}", PNG + stem.encode())


def test_file_names_go_before_numbers_of_rows_that_are_names_of_images_too(tmp_path):
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    rows = [f"{number}.png,{row},{'ab'[number % 2]}" for row, number in enumerate(order)]
    table(tmp_path, "labels.csv", ["filename,id,label", *rows])
    found = labels_by_name(folder(tmp_path, 8, SPLIT))
    assert found == {f"images/{number}.png": "ab"[number % 2] for number in range(8)}
    sets.write(tmp_path / "labels.csv", "\n".join(["id,name,label", *(row.replace(".png", "") for row in rows)]))
    with pytest.raises(UserError, match=r"columns id and name both name images, and not the same .* image_column=NAME"):
        folder(tmp_path, 8, SPLIT)
    named = Choices(test_share=0.25, image_column="id")
    assert labels_by_name(folder(tmp_path, 8, named)) == found


def test_csv_of_no_part_never_takes_the_place_of_train(tmp_path):
    rows = [f"{number},{'ab'[number % 2]}" for number in range(8)]
    table(tmp_path, "labels.csv", ["id,label", *rows])
    table(tmp_path, "train.csv", ["id,label", *rows[:6]])
    with pytest.raises(UserError, match=r"labels\.csv and train\.csv are there, expected one CSV for each part"):
        folder(tmp_path, 8, SPLIT)
    table(tmp_path, "test.csv", ["id,label", *rows[6:]])
    source = folder(tmp_path, 8)
    assert (len(source.train.labels), len(source.test.labels)) == (6, 2)
    assert source.description.endswith(", labels.csv not read (of no part)")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(
        UserError, match=r"\.csv: line [28] is in (train|test), and images/6\.png is in (test|train) too"
    ):
        folder(tmp_path, 8)


def test_gtsrb_as_on_kaggle(tmp_path):
    """Folders of classes for train, a flat test with its CSV, and a table of the classes' signs."""
    for part, names in (("Train", ("0/a", "1/b", "0/c", "1/d")), ("Test", ("00", "01")), ("Meta", ("0", "1"))):
        paths = [f"{part}/{name}.png" for name in names]
        rows = [f"9,{path},{path.split('/')[1] if part == 'Train' else path[-5]}" for path in paths]
        sets.write(tmp_path / f"{part}.csv", "\n".join(["Width,Path,ClassId", *rows]))
        for path in paths:
            sets.write(tmp_path / path, PNG + path.encode())
    for choices in (Choices(), Choices(image_column="Path", label_column="ClassId")):
        found = labels_by_name(folder(tmp_path, 8, choices))
        expected = {
            "Train/0/a": "0",
            "Train/0/c": "0",
            "Train/1/b": "1",
            "Train/1/d": "1",
            "Test/00": "0",
            "Test/01": "1",
        }
        assert found == {f"{path}.png": label for path, label in expected.items()}


def test_images_of_one_csv_may_be_in_two_folders_but_not_in_those_of_another_part(tmp_path):
    for half in (0, 1):
        table(tmp_path, "metadata.csv", ["id,dx", *(f"x{i},a" for i in range(4 * half, 4 * half + 4))], f"part_{half}")
    rows = [f"x{i},{'ab'[i % 2]}" for i in range(8)]
    sets.write(tmp_path / "metadata.csv", "\n".join(["id,dx", *rows]))
    dx = Choices(test_share=0.25, label_column="dx")
    assert labels_by_name(folder(tmp_path, 8, dx)) == {f"part_{i // 4}/x{i}.png": "ab"[i % 2] for i in range(8)}
    sets.write(tmp_path / "part_1" / "x0.png", PNG)
    with pytest.raises(UserError, match=r"line 2 names 'x0' .* which may be part_[01]/x0\.png or part_[01]/x0\.png"):
        folder(tmp_path, 8, dx)
    for i in range(1, 4):
        sets.write(tmp_path / "part_1" / f"x{i}.png", PNG)
    assert all(name.startswith("part_1/") for name in labels_by_name(folder(tmp_path, 8, dx)))
    (tmp_path / "part_1").rename(tmp_path / "test")  # which has all names, and is another part's
    with pytest.raises(UserError, match=r"line 6 names 'x4' .* no such image \(4 of 8 rows\)"):
        folder(tmp_path, 8, dx)


def test_two_images_of_one_stem_are_not_chosen_among(tmp_path):
    table(tmp_path, "labels.csv", ["id,label", *(f"{i},{'ab'[i % 2]}" for i in range(8))])
    sets.write(tmp_path / "images" / "3.jpg", PNG)
    with pytest.raises(UserError, match=r"line 5 names '3' .*images/3\.(png or images/3\.jpg|jpg or images/3\.png)"):
        folder(tmp_path, 8, SPLIT)


@pytest.mark.parametrize("column", ["set", "dataset", "Split"])
def test_column_is_a_split_only_where_it_says_parts(tmp_path, column):
    rows = [f"{i},{'ab'[i % 2]},vidir" for i in range(8)]
    table(tmp_path, "meta.csv", [f"id,label,{column}", *rows])
    assert len(folder(tmp_path, 8, SPLIT).test.labels) == 2


def test_test_without_labels_does_not_hide_validation(tmp_path):
    for part, label in (("train", "ab"), ("val", "ab"), ("test", ("", ""))):
        table(tmp_path, f"{part}.csv", ["id,label", *(f"{part}{i},{label[i % 2]}" for i in range(4))], part)
    source = folder(tmp_path, 8)
    assert source.test.images.name(0) == "val/val0.png"
    assert source.description.endswith(", test not read (4 rows without labels)")
    sets.write(tmp_path / "test.csv", "id\ntest0\n")
    assert folder(tmp_path, 8).description.endswith(", test.csv not read (no columns of images and labels)")


@pytest.mark.parametrize("name", [" label", "LABEL"])
@pytest.mark.parametrize("path", ["./images/{}.png", "images\\{}.png", "/images/{}"])
def test_columns_and_paths_are_found_as_people_write_them(tmp_path, name, path):
    table(tmp_path, "labels.csv", ["id,label", *(f"{i},{'ab'[i % 2]}" for i in range(8))])
    rows = [f"{path.format(i)},{'ab'[i % 2]}" for i in range(8)]
    sets.write(tmp_path / "labels.csv", "\n".join([f"id,{name}", *rows]))
    found = labels_by_name(folder(tmp_path, 8, Choices(test_share=0.25, label_column="label")))
    assert found == {f"images/{i}.png": "ab"[i % 2] for i in range(8)}


def test_label_that_only_looks_like_a_number_is_a_name(tmp_path):
    labels = ("\u00b2", "10", "9", "\u0663")
    table(tmp_path, "labels.csv", ["id,label", *(f"{i},{labels[i % 4]}" for i in range(16))])
    assert folder(tmp_path, 8, SPLIT).classes == ("\u00b2", "\u0663", "9", "10")


def test_unicode_forms_of_classes_and_of_files_are_named(tmp_path):
    composed, split = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    table(tmp_path, "labels.csv", ["id,label", *(f"{i},{(composed, split, 'b')[i % 3]}" for i in range(12))])
    with pytest.raises(UserError, match=r"class .* is there twice: one is in the Unicode form NFC, the other in NFD"):
        folder(tmp_path, 8, SPLIT)
    table(tmp_path, "labels.csv", ["id,label", *(f"{split}{i},{'ab'[i % 2]}" for i in range(8))])
    sets.write(tmp_path / "labels.csv", "\n".join(["id,label", *(f"{composed}{i},{'ab'[i % 2]}" for i in range(8))]))
    with pytest.raises(UserError, match=r"no such image: one is in the Unicode form NFC, the other in NFD; rename"):
        folder(tmp_path, 8, SPLIT)
