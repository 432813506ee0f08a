import itertools
import json
import shutil
from pathlib import Path

import image_sets as sets
import numpy as np
import pytest
from PIL import Image

from effvit.data.preparing import prepare
from effvit.data.sources.imagenet100 import imagenet100, standard_wnids
from effvit.data.sources.layout import Choices
from effvit.errors import UserError

WNIDS = standard_wnids()
SOME = sorted(WNIDS)[:4]


def make_images(folder, count):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(folder.name[1:]) + count)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{folder.name}_{index}.JPEG")


@pytest.fixture
def tree(tmp_path):
    """Four classes, train/<wnid> and val/<wnid>."""
    for wnid in SOME:
        make_images(tmp_path / "tree" / "train" / wnid, 6)
        make_images(tmp_path / "tree" / "val" / wnid, 2)
    return tmp_path / "tree"


def as_kaggle(tree, root):
    for index, wnid in enumerate(SOME):
        shutil.copytree(tree / "train" / wnid, root / f"train.X{index % 4 + 1}" / wnid)
        shutil.copytree(tree / "val" / wnid, root / "val.X" / wnid)
    names = {wnid: f"name {index}, other" for index, wnid in enumerate(SOME)}
    (root / "Labels.json").write_text(json.dumps(names))
    return root


def with_more_classes(tree, root):
    shutil.copytree(tree, root)
    for wnid in ("n00000001", "n99999999"):
        for split in ("train", "val"):
            shutil.copytree(tree / split / SOME[0], root / split / wnid)
    return root


def write_list(path, wnids):
    path.write_text("\n".join(wnids) + "\n")
    return path


@pytest.mark.parametrize("size", [8, 96])
def test_three_layouts_of_the_same_images_give_the_same_arrays(tmp_path, tree, size):
    kaggle, more = as_kaggle(tree, tmp_path / "kaggle"), with_more_classes(tree, tmp_path / "more")
    chosen = write_list(tmp_path / "list.txt", reversed(SOME))
    for name, root, classes in (("a", tree, None), ("b", kaggle, None), ("c", more, chosen)):
        prepare("imagenet100", root, size, tmp_path / name, classes=classes)
    files = sorted(path.name for path in (tmp_path / "a").iterdir() if path.suffix in (".npy", ".arrow"))
    assert len(files) == 6
    for other in ("b", "c"):
        for name in files:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / other / name).read_bytes()


def test_official_validation_part_is_the_test_split(tree):
    source = imagenet100(tree, 8)
    assert len(source.train.labels) == 24 and source.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(path.startswith("val/") for path in source.test.images.paths)
    assert source.classes == tuple(SOME)


def test_of_a_thousand_classes_the_usual_hundred_are_taken(tmp_path):
    others = [f"n9{index:07}" for index in range(900)]
    for wnid in (*WNIDS, *others):
        for split in ("train", "val"):
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "1.JPEG").touch()
    source = imagenet100(tmp_path, 8)
    assert source.classes == tuple(sorted(WNIDS)) and len(source.train.labels) == 100
    shutil.rmtree(tmp_path / "val" / WNIDS[3])
    with pytest.raises(UserError, match=f"class '{WNIDS[3]}' is missing from val: .*/train/{WNIDS[3]} has no val"):
        imagenet100(tmp_path, 8)
    shutil.rmtree(tmp_path / "train" / WNIDS[3])
    with pytest.raises(UserError, match=f"has 999 classes, .* but {WNIDS[3]} is not there; name a file .* as classes"):
        imagenet100(tmp_path, 8)


def test_classes_of_several_parts_are_counted_once(tmp_path):
    wnids = [f"n9{index:07}" for index in range(60)]
    for wnid, part in itertools.product(wnids, ("train.X1", "train.X2", "val.X")):
        (tmp_path / part / wnid).mkdir(parents=True)
        (tmp_path / part / wnid / "1.JPEG").touch()
    assert imagenet100(tmp_path, 8).classes == tuple(wnids)


def test_the_usual_hundred_are_a_hundred_wnids():
    assert len(set(WNIDS)) == 100
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in WNIDS)


@pytest.mark.parametrize("layout", [as_kaggle, with_more_classes])
def test_names_come_from_labels_json_in_any_layout_and_stay_distinct(tmp_path, tree, layout):
    root = layout(tree, tmp_path / "root")
    names = dict(zip(SOME, ["crane, machine", "robin, Turdus", "crane, bird", ""], strict=True))
    (root / "Labels.json").write_text(json.dumps(names), encoding="utf-8-sig")
    classes = imagenet100(root, 8, Choices(write_list(tmp_path / "list.txt", SOME))).classes
    assert classes == (f"crane ({SOME[0]})", "robin", f"crane ({SOME[2]})", SOME[3])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val.X").rename(root / "vals"), "found train.X1/ and no test/ or val/ .is vals/ meant"),
        (lambda root: (root / "Labels.json").write_text("[1]"), r"Labels\.json: expected a JSON object"),
        (lambda root: shutil.rmtree(root / "val.X" / SOME[1]), f"class '{SOME[1]}' is missing from val.X"),
    ],
)
def test_what_is_wrong_with_a_release_is_named(tmp_path, tree, spoil, message):
    root = as_kaggle(tree, tmp_path / "kaggle")
    spoil(root)
    with pytest.raises(UserError, match=message):
        imagenet100(root, 8)


def test_default_root_is_below_effvit_data(monkeypatch, tmp_path, tree):
    tree.rename(tmp_path / "imagenet100")
    monkeypatch.setenv("EFFVIT_DATA", str(tmp_path))
    assert len(imagenet100(None, 8).classes) == 4


def test_names_are_found_where_the_images_are(tmp_path):
    for place in ("x", "y/inner"):
        root = sets.as_tree(sets.make_pictures(train=4, val=2), tmp_path / place)
        sets.write(root / "Labels.json", json.dumps({"ant": "an ant, insect"}))
    archive = shutil.make_archive(str(tmp_path / "z"), "zip", tmp_path / "x")
    for root in (tmp_path / "x", tmp_path / "y", Path(archive)):
        assert imagenet100(root, 8).classes == ("an ant", "bee", "cat")
