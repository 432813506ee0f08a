"""Parquet and Arrow files as Hugging Face's ``datasets`` has them; labels checked against pyarrow read plainly."""

import json
import os
import pickle
import unicodedata

import image_sets as sets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effvit.data.preparing import prepare
from effvit.data.sources import rows
from effvit.data.sources.cifar import cifar10, cifar100
from effvit.data.sources.folder import folder
from effvit.data.sources.layout import Choices
from effvit.data.sources.rows import Rows
from effvit.errors import UserError

PICTURES = sets.make_pictures(train=4, test=2)
CONTENT = [picture.content for picture in PICTURES["train"]]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(contents=CONTENT, path=None):
    return pa.array([{"bytes": content, "path": path} for content in contents], STRUCT)


def save(root, metadata=None, parts=("train", "test"), **columns):
    """The same columns as train and test."""
    root.mkdir(exist_ok=True)
    for part in parts:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), root / f"{part}.parquet")
    return root


def labelled(root, part):
    """Name of class and content of each row, by pyarrow and json alone."""
    table = pq.read_table(root / f"{part}.parquet")
    info = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    image, label = (next(name for name in info if info[name]["_type"] == kind) for kind in ("Image", "ClassLabel"))
    names = info[label]["names"]
    return [(names[row[label]], row[image]["bytes"]) for row in table.to_pylist()]


def read(source):
    return [
        [(source.classes[split.labels[row]], split.images.read(row)) for row in range(len(split.labels))]
        for split in (source.train, source.test)
    ]


def test_shuffled_rows_keep_their_order_and_their_classes_as_the_schema_has_them(tmp_path):
    order = np.random.default_rng(0).permutation(12)
    names = ["zebra", "ant", "bee"]  # which the folders of a tree would not have in this order
    metadata = sets.features(img={"_type": "Image"}, label={"_type": "ClassLabel", "names": names})
    contents = [CONTENT[row] for row in order]
    root = save(tmp_path / "x", metadata, img=images(contents), label=pa.array(order % 3), idx=pa.array(order))
    source = folder(root, 8)
    assert source.classes == tuple(names)
    assert read(source) == [labelled(root, "train"), labelled(root, "test")]


def cifar100_table(root):
    fine, coarse = np.arange(200) % 100, np.arange(200) % 20
    kinds = {"_type": "ClassLabel", "names": [f"f{i}" for i in range(100)]}
    of_coarse = {"_type": "ClassLabel", "names": [f"c{i}" for i in range(20)]}
    metadata = sets.features(img={"_type": "Image"}, fine_label=kinds, coarse_label=of_coarse)
    contents = [CONTENT[0]] * 200
    return save(root, metadata, img=images(contents), fine_label=pa.array(fine), coarse_label=pa.array(coarse))


def test_cifar100_has_fine_labels_and_coarse_ones_by_name(tmp_path):
    root = cifar100_table(tmp_path / "x")
    assert cifar100(root, 8).train.labels.tolist() == (np.arange(200) % 100).tolist()
    source = folder(root, 8, Choices(label_column="coarse_label"))
    assert source.train.labels.tolist() == (np.arange(200) % 20).tolist() and source.classes[19] == "c19"
    with pytest.raises(UserError, match=r"has 20 classes .*coarse_label\), CIFAR100 has 100"):
        cifar100(root, 8, Choices(label_column="coarse_label"))
    with pytest.raises(UserError, match=r"has 100 classes .*, CIFAR10 has 10"):
        cifar10(root, 8)


def test_classes_without_names_are_numbers_or_texts(tmp_path):
    ten = pa.array([10, 9] * 6)
    assert folder(save(tmp_path / "x", image=images(), label=ten), 8).classes == ("9", "10")
    text = pa.array(["dog", "cat"] * 6)
    source = folder(save(tmp_path / "y", jpg=pa.array(CONTENT), cls=text), 8)
    assert source.classes == ("cat", "dog") and source.train.labels.tolist() == [1, 0] * 6


def test_test_part_without_labels_does_not_hide_validation(tmp_path):
    root = tmp_path / "x"
    save(root, image=images(), label=pa.array([0, 1] * 6), parts=("train", "validation"))
    save(root, image=images(), label=pa.array([-1] * 12), parts=("test",))
    source = folder(root, 8)
    assert "test not read (12 rows without labels)" in source.description and source.validation is None
    assert source.test.images.name(0).startswith("validation.parquet")


def test_test_part_without_a_column_of_labels_does_not_hide_validation(tmp_path):
    root = tmp_path / "x"
    save(root, image=images(), label=pa.array([0, 1] * 6), parts=("train", "validation"))
    save(root, image=images(), parts=("test",))
    source = folder(root, 8)
    assert "test not read (12 rows without labels)" in source.description and source.validation is None
    assert source.test.images.name(0).startswith("validation.parquet")


def test_a_shard_without_the_column_of_labels_that_others_have_is_named(tmp_path):
    root = tmp_path / "x"
    save(root, image=images(), label=pa.array([0, 1] * 6), parts=("train-a", "test"))
    save(root, image=images(), parts=("train-b",))
    with pytest.raises(UserError, match=r"train-b\.parquet: has no column label, as other files have"):
        folder(root, 8)


def test_train_alone_is_divided_by_a_share(tmp_path):
    root = save(tmp_path / "x", image=images(), label=pa.array([0, 1] * 6), parts=("train",))
    with pytest.raises(UserError, match=r"found training images and no test .* test_share=0\.2"):
        folder(root, 8)
    source = folder(root, 8, Choices(test_share=1 / 3))
    found = [row for split in read(source) for row in split]
    assert sorted(content for _, content in found) == sorted(CONTENT)
    assert source.test.labels.tolist() == [0, 1, 0, 1] and "33% of each class held out" in source.description


def test_single_file_can_be_named(tmp_path):
    root = save(tmp_path / "x", image=images(), label=pa.array([0, 1] * 6))
    source = folder(root / "train.parquet", 8, Choices(test_share=0.25))
    assert len(source.train.labels) + len(source.test.labels) == 12


def test_reading_holds_few_rows_whatever_the_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BATCH_ROWS", 2)
    for group in (1, 3, 12):
        pq.write_table(pa.table({"image": images()}), tmp_path / "x.parquet", row_group_size=group)
        lot = pickle.loads(pickle.dumps(Rows(tmp_path, "x.parquet", "image", np.arange(12))))
        for order in (range(12), [11, 0, 5, 5, 4, 9], range(11, -1, -1)):
            assert [lot.read(row) for row in order] == [CONTENT[row] for row in order]
        for part in range(0, 12, 4):  # as workers take them
            assert [lot.take(np.arange(part, part + 4)).read(row) for row in range(4)] == CONTENT[part : part + 4]


def test_file_is_opened_once_for_lots_that_follow_one_another_and_anew_when_it_changed(tmp_path, monkeypatch):
    opened = []
    parquet = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *args, **options: opened.append(1) or parquet(*args, **options))
    for time, contents in enumerate((CONTENT, CONTENT[::-1])):
        opened.clear()
        pq.write_table(pa.table({"image": images(contents)}), tmp_path / "x.parquet", row_group_size=3)
        os.utime(tmp_path / "x.parquet", ns=(time, time))
        lot = Rows(tmp_path, "x.parquet", "image", np.arange(12))
        assert [lot.take(np.array([row])).read(0) for row in range(12)] == contents
        assert opened == [1]


def test_rows_after_damaged_ones_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": images()}), path, row_group_size=4, use_dictionary=False, compression="zstd")
    start, end = (pq.read_metadata(path).row_group(group).column(0).data_page_offset for group in (1, 2))
    whole = bytearray(path.read_bytes())
    whole[start:end] = bytes(end - start)  # the second of three row groups
    path.write_bytes(whole)
    lot = Rows(tmp_path, "x.parquet", "image", np.arange(12))
    for row in (0, 1, 2, 3, 8, 9, 10, 11):
        assert lot.read(row) == CONTENT[row]
    for row in range(12):
        if row in range(4, 8):
            with pytest.raises(UserError, match=rf"x\.parquet\[{row}\]: damaged file"):
                lot.read(row)
        else:
            assert lot.read(row) == CONTENT[row]


NAMES = {"_type": "ClassLabel", "names": ["a", "b"]}
TYPED = sets.features(image={"_type": "Image"}, label=NAMES)
LABELS = pa.array([0, 1] * 6)


@pytest.mark.parametrize(
    ("columns", "choices", "message"),
    [
        (
            {"image": images(), "text": LABELS.cast(pa.float64())},
            {},
            r"x/t.*: has no column of labels; its columns are image, text",
        ),
        ({"image": images(), "label": LABELS, "b": images()}, {"image_column": "imag"}, r"image_column=imag: .* \(did"),
        (
            {"x": images(), "label": LABELS, "b": images()},
            {},
            r"several columns with images \(x, b\); .*image_column=NAME",
        ),
        ({"image": LABELS, "label": LABELS}, {}, "no column with images"),
        (
            {"image": images(), "label": LABELS},
            {"image_column": "label"},
            "image_column=label: in .* it is int64, expected encoded images",
        ),
        (
            {"image": images(), "x": LABELS, "y": LABELS},
            {},
            r"several columns that may be labels \(x, y\); .*_column=NAME",
        ),
        (
            {"image": images(), "label": pa.array([[0, 1]] * 12)},
            {"label_column": "label"},
            "label_column=label: in .* it is list<.*, expected one class for each row",
        ),
        ({"image": images(), "label": pa.array([0, -1, 1] * 4)}, {}, r"\.parquet\[1\]: no label in the column 'label'"),
        ({"image": images(), "label": pa.array([0, None] * 6)}, {}, r"\.parquet\[1\]: no label in the column 'label'"),
        ({"image": images([]), "label": pa.array([], pa.int64())}, {}, "expected at least 2 classes, found 0"),
        ({"image": images(), "label": pa.array([7] * 12)}, {}, "expected at least 2 classes, found 1 .'7'"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, choices, message):
    root = save(tmp_path / "x", **columns)
    with pytest.raises(UserError, match=message):
        folder(root, 8, Choices(**choices))


@pytest.mark.parametrize("label", [2, -2])
def test_label_out_of_range_is_named_with_its_row(tmp_path, label):
    root = save(tmp_path / "x", TYPED, image=images(), label=pa.array([0, 1, label] * 4))
    with pytest.raises(UserError, match=rf"\.parquet\[2\]: the label {label} in 'label' is none of the 2 classes"):
        folder(root, 8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pa.array([None] * 12, STRUCT), r"train\.parquet\[0\]: has no image$"),
        (images([None] * 12, "/data/1.png"), "has no image, only the path '/data/1.png' of a file elsewhere"),
    ],
)
def test_row_without_an_image_is_named_when_it_is_read(tmp_path, image, message):
    source = folder(save(tmp_path / "x", TYPED, image=image, label=LABELS), 8)
    with pytest.raises(UserError, match=message):
        source.train.images.read(0)


def test_row_without_an_image_is_named_once_among_the_damaged(tmp_path):
    image = pa.array([{"bytes": content} for content in CONTENT[:11]] + [None], STRUCT)
    root = save(tmp_path / "x", TYPED, image=image, label=LABELS)
    with pytest.raises(UserError, match=r": /.*x/train\.parquet\[11\]: has no image; /.*x/test\.parquet\[11\]: has no"):
        prepare("folder", root, 8, tmp_path / "out")
    assert "\ntrain.parquet[11],has no image\n" in (tmp_path / ".out.partial" / "damaged.csv").read_text()


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_file_cut_short_is_named(tmp_path, keep):
    root = save(tmp_path / "x", TYPED, image=images(), label=LABELS)
    content = (root / "test.parquet").read_bytes()
    (root / "test.parquet").write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"test\.parquet: (not a whole|damaged)"):
        folder(root, 8)


def test_damage_in_the_middle_is_named_when_it_is_read(tmp_path):
    root = save(tmp_path / "x", TYPED, image=images(), label=LABELS)
    content = bytearray((root / "train.parquet").read_bytes())
    content[4:60] = b"\xff" * 56  # the first page
    (root / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet\[0\]: damaged file"):
        folder(root, 8).train.images.read(0)


def test_offset_in_an_arrow_file_that_leads_elsewhere_is_refused(tmp_path):
    root = sets.as_saved_to_disk(PICTURES, tmp_path / "x")
    path = root / "train" / "data-00000-of-00001.arrow"
    content = bytearray(path.read_bytes())
    first = np.cumsum([0] + [len(picture) for picture in CONTENT[:4]]).astype("<i4").tobytes()
    at = content.index(first)
    content[at + 4 : at + 8] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow\[0\]: damaged file"):
        folder(root, 8).train.images.read(0)


def test_arrow_file_cut_short_is_named(tmp_path):
    root = sets.as_saved_to_disk(PICTURES, tmp_path / "x")
    path = root / "train" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: (not a whole|damaged)"):
        folder(root, 8)


def test_several_data_sets_are_named(tmp_path):
    for config in ("160px", "320px"):
        sets.as_parquet(PICTURES, tmp_path / config)
    with pytest.raises(UserError, match="holds several data sets, in 160px/data, 320px/data; name one as root"):
        folder(tmp_path, 8)
    assert len(folder(tmp_path / "160px", 8).train.labels) == 12


def test_file_of_no_split_is_named(tmp_path):
    root = save(tmp_path / "x", TYPED, parts=("train", "other"), image=images(), label=LABELS)
    with pytest.raises(UserError, match=r"other\.parquet does not say which split it is"):
        folder(root, 8)


def test_folders_of_classes_next_to_tables_are_refused(tmp_path):
    sets.as_parquet(PICTURES, tmp_path)
    sets.as_tree(PICTURES, tmp_path)
    with pytest.raises(UserError, match=r"holds two data sets, Parquet files, .* and folders of classes; move one"):
        folder(tmp_path, 8)


def named(root, part, names, labels):
    """A part whose numbers stand for ``names``."""
    metadata = sets.features(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": names})
    save(root, metadata, parts=(part,), image=images(), label=pa.array(labels))


def test_numbers_stand_for_what_each_file_says(tmp_path):
    root = tmp_path / "x"
    named(root, "train", ["cat", "dog"], [0, 1] * 6)
    named(root, "test", ["dog", "bird", "cat"], [0, 2, 1] * 4)
    assert read(folder(root, 8)) == [labelled(root, "train"), labelled(root, "test")]
    save(root, parts=("test",), image=images(), label=LABELS)
    with pytest.raises(UserError, match=r"test\.parquet: has no names of its classes .*, as train\.parquet has"):
        folder(root, 8)


@pytest.mark.parametrize(("numbers", "missing"), [((0, 2), 1), ((1, 3), 2), ((1,), 0), ((0, 1), 2)])
def test_missing_shard_is_named(tmp_path, numbers, missing):
    for number in numbers:
        save(tmp_path, TYPED, parts=(f"train-{number:05}-of-00003-{number}ab",), image=images(), label=LABELS)
    save(tmp_path, TYPED, parts=("test-00001-of-00001",), image=images(), label=LABELS)
    with pytest.raises(UserError, match=rf"train-0000{missing}-of-00003\.parquet: is missing"):
        folder(tmp_path, 8)
    one = tmp_path / f"train-{numbers[0]:05}-of-00003-{numbers[0]}ab.parquet"
    assert len(folder(one, 8, Choices(test_share=0.5)).train.labels) == 6


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (pa.array(["dog", "cat"] * 6).dictionary_encode(), ("cat", "dog")),
        (pa.array([True, False] * 6), ("false", "true")),
        (pa.array([1, -1] * 6), ("-1", "1")),
        (pa.array([2**62, 9] * 6, pa.uint64()), ("9", str(2**62))),
    ],
)
def test_labels_of_other_types(tmp_path, label, classes):
    source = folder(save(tmp_path / "x", image=images(), label=label), 8)
    assert source.classes == classes and source.train.labels.tolist() == [1, 0] * 6


def test_number_too_large_is_named(tmp_path):
    root = save(tmp_path / "x", image=images(), label=pa.array([1, 2**64 - 1] * 6, pa.uint64()))
    with pytest.raises(UserError, match=r"\.parquet: the column 'label' has numbers above 9223372036854775807"):
        folder(root, 8)


def test_unicode_forms_of_classes_are_named(tmp_path):
    forms = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    for part, form in zip(("train", "test"), forms, strict=True):
        save(tmp_path, image=images(), label=pa.array([form, "tea"] * 6), parts=(part,))
    with pytest.raises(UserError, match="is there twice: one is in the Unicode form NFC, the other in NFD"):
        folder(tmp_path, 8)


def test_columns_are_found_in_any_case(tmp_path):
    root = save(tmp_path / "x", picture=images(), Kind=LABELS)
    assert folder(root, 8, Choices(image_column="PICTURE", label_column=" kind")).description.endswith(
        "picture and Kind"
    )


@pytest.mark.parametrize("split", [True, False])
def test_table_of_something_else_does_not_hide_folders_of_classes(tmp_path, split):
    root = sets.as_tree(PICTURES, tmp_path / "x")
    root = root if split else root / "train"
    pq.write_table(pa.table({"file": ["a"], "label": [1]}), root / "metadata.parquet")
    np.savez(root / "features.npz", features=np.zeros(3))
    assert folder(root, 8, Choices(test_share=None if split else 0.25)).classes == ("ant", "bee", "cat")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_flipped_bytes_are_one_line_or_change_nothing_that_is_checked(tmp_path, kind):
    """Whatever pyarrow raises on damaged metadata; without data its readers crash on none of these."""
    table = pa.table({"image": images(), "label": pa.array(["cat", "dog"] * 6)})
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    region = range(len(whole) - 700, len(whole)) if kind == "parquet" else range(8, 600)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        content[rng.choice(region)] = rng.integers(256)
        path.write_bytes(content)
        try:
            folder(path, 8, Choices(test_share=0.5)).train.images.read(0)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20
