"""Folders of classes: parts by their names, divided by a share, nested; and nothing lost in silence."""

import shutil
import unicodedata
from collections import Counter

import image_sets as sets
import numpy as np
import pytest

from effvit.data.sources.folder import folder
from effvit.data.sources.holdout import hold_out
from effvit.data.sources.layout import Choices
from effvit.errors import UserError

PICTURES = sets.make_pictures(train=5, test=2)
PNG = PICTURES["train"][0].content


@pytest.fixture
def tree(tmp_path):
    return sets.as_tree(PICTURES, tmp_path / "x")


def names(split):
    return [split.images.name(row) for row in range(len(split.labels))]


@pytest.mark.parametrize("given", [("Train", "Valid"), ("training", "validation"), ("train", "testing")])
def test_parts_are_known_by_their_usual_names_in_any_case(tmp_path, given):
    root = sets.as_tree(PICTURES, tmp_path, zip(("train", "test"), given, strict=True))
    source = folder(root, 8)
    assert len(source.train.labels) == 15 and all(name.startswith(given[1]) for name in names(source.test))


def test_part_under_two_names_is_refused(tree):
    for name in ("val", "valid"):
        shutil.copytree(tree / "test", tree / name)
    with pytest.raises(UserError, match="val/ and valid/ are there, expected one of them"):
        folder(tree, 8)


def test_whole_set_is_divided_by_the_rule_of_hold_out(tree):
    with pytest.raises(UserError, match=r"3 classes with 15 images and no split .*; add test_share=0\.2"):
        folder(tree / "train", 8)
    source = folder(tree / "train", 8, Choices(test_share=0.4))
    everything = [f"{p.label}/{p.name}" for p in PICTURES["train"]]
    labels = np.repeat(np.arange(3), 5)
    kept, held = hold_out(labels, every=2.5)
    assert names(source.train) == [everything[row] for row in kept] and Counter(labels[held]) == {0: 2, 1: 2, 2: 2}
    assert names(source.test) == [everything[row] for row in held]
    assert source.description == "folder tree <class>, 40% of each class held out as test split by a fixed rule"


@pytest.mark.parametrize("share", [0, -0.1, 0.6, 1])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match=rf"test_share={share}: expected more than 0, up to 0\.5"):
        Choices(test_share=share)


def test_share_next_to_a_test_part_is_refused(tree):
    with pytest.raises(UserError, match=r"test_share=0\.2: .* has a test split already"):
        folder(tree, 8, Choices(test_share=0.2))


@pytest.mark.parametrize("content", ["flat", "folder", "empty"])
def test_test_part_without_labels_does_not_hide_a_good_val(tree, content):
    (tree / "test").rename(tree / "val")
    if content == "empty":
        (tree / "test").mkdir()
    for index in range(4 * (content != "empty")):
        sets.write(tree / "test" / ("unknown" * (content == "folder")) / f"{index}.png", PNG)
    source = folder(tree, 8)
    assert all(name.startswith("val/") for name in names(source.test)) and source.validation is None
    assert f"test/ not read ({4 * (content == 'flat')} files without folders of classes)" in source.description
    shutil.rmtree(tree / "val")
    with pytest.raises(UserError, match="test/: expected a folder for each class, with its images; found"):
        folder(tree, 8)
    assert len(folder(tree, 8, Choices(test_share=0.2)).test.labels) == 3


def test_class_that_is_a_link_to_nowhere_is_refused_by_name(tree):
    shutil.rmtree(tree / "train" / "bee")
    (tree / "train" / "bee").symlink_to(tree / "gone")
    for choices in (Choices(), Choices(test_share=0.2)):
        with pytest.raises(UserError, match="train/bee: a link that leads nowhere; mend or remove it"):
            folder(tree, 8, choices)
    (tree / "train" / "bee").unlink()
    (tree / "train" / "bee").symlink_to(tree / "test" / "bee")
    assert len(folder(tree, 8).train.labels) == 12
    (tree / "train" / "bee" / "x.png").symlink_to(tree / "gone")
    with pytest.raises(UserError, match=r"x\.png: .*a link that leads nowhere"):
        folder(tree, 8)


def test_part_that_is_a_link_to_nowhere_is_refused_by_name(tree):
    shutil.rmtree(tree / "test")
    (tree / "test").symlink_to(tree / "gone")
    with pytest.raises(UserError, match="x/test: a link that leads nowhere"):
        folder(tree, 8)


def test_link_that_leads_back_is_refused(tree):
    (tree / "train" / "bee" / "again").symlink_to(tree / "train" / "bee")
    with pytest.raises(UserError, match="folders in folders 17 levels deep; does a link lead back"):
        folder(tree, 8)


def test_litter_of_servers_and_systems_is_no_class(tree):
    for name in ("@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".cache"):
        for place in (tree, tree / "train", tree / "train" / "bee"):
            sets.write(place / name / "thumb.png", PNG)
    source = folder(tree, 8)
    assert source.classes == ("ant", "bee", "cat") and len(source.train.labels) == 15
    assert source.train.notes == {"stray files ignored": 10}


def test_images_in_folders_within_a_class_are_of_that_class_and_counted(tree):
    sets.write(tree / "train" / "bee" / "a" / "b" / "x.png", PNG)
    (tree / "train" / "cat" / "empty").mkdir()
    source = folder(tree, 8)
    assert source.train.notes == {"images in folders within their class's folder": 1}
    assert "train/bee/a/b/x.png" in names(source.train) and source.train.labels.tolist().count(1) == 6


def test_level_of_the_classes_is_chosen(tmp_path):
    for part in ("train", "test"):
        for name in ("fish/ray", "fish/eel", "bird/owl"):
            for index in range(3):
                sets.write(tmp_path / part / name / f"{index}.png", PNG)
    assert folder(tmp_path, 8).classes == ("bird", "fish")
    fine = folder(tmp_path, 8, Choices(label_level=2))
    assert fine.classes == ("eel", "owl", "ray") and fine.description.endswith("at level 2")
    assert names(fine.test)[:3] == [f"test/fish/eel/{index}.png" for index in range(3)]
    sets.write(tmp_path / "train" / "fish" / "x.png", PNG)
    with pytest.raises(
        UserError, match=r"label_level=2: .*x\.png is an image above the folders of classes; label_level=1 makes fish"
    ):
        folder(tmp_path, 8, Choices(label_level=2))
    (tmp_path / "train" / "fish" / "x.png").unlink()
    sets.write(tmp_path / "train" / "bird" / "eel" / "x.png", PNG)
    with pytest.raises(UserError, match="class 'eel' is in bird/eel and in fish/eel; rename one"):
        folder(tmp_path, 8, Choices(label_level=2))


def test_unicode_forms_are_named(tree, tmp_path):
    composed, split = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (tree / "train" / "cat").rename(tree / "train" / composed)
    (tree / "test" / "cat").rename(tree / "test" / split)
    with pytest.raises(UserError, match=r"class .* is there twice: one is in the Unicode form NF., the other in NF"):
        folder(tree, 8)
    (tree / "test" / split).rename(tree / "test" / composed)
    (tmp_path / "list").write_text(f"ant\n{split}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is wanted, .*: one is in the Unicode form NFD, the other in NFC; rename"):
        folder(tree, 8, Choices(tmp_path / "list"))


def test_class_under_a_similar_name_is_suggested(tree):
    (tree / "test" / "cat").rename(tree / "test" / "cats")
    with pytest.raises(UserError, match=r"class 'cat' is missing from test: .* counterpart \(did you mean cats\?\)"):
        folder(tree, 8)
