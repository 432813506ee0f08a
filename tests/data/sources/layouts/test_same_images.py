"""The same images in every layout give the same arrays, and the labels that an independent reader finds."""

import os
import tarfile
from collections import Counter
from pathlib import Path

import image_sets as sets
import numpy as np
import pytest

from effvit.data.preparing import prepare
from effvit.data.sources.folder import folder
from effvit.data.sources.layout import Choices

PICTURES = sets.make_pictures(train=12, val=4)
ALL = sets.make_pictures(train=6, val=3, test=4)
SHARED = Path(os.environ.get("EFFVIT_SHARED", Path(__file__).parents[4] / ".." / "shared")) / "data"


def below_one_folder(pictures, root):
    sets.as_tree(pictures, root / "release" / "images")
    return root


def kaggle_parts(pictures, root):
    """train.X1, train.X2 and val.X, as the ImageNet-100 on Kaggle."""
    for picture in pictures["train"]:
        part = 1 + (picture.label > "ant")
        sets.write(root / f"train.X{part}" / picture.label / picture.name, picture.content)
    for picture in pictures["val"]:
        sets.write(root / "val.X" / picture.label / picture.name, picture.content)
    return root


def nested(pictures, root):
    """Folders within the folder of a class; their names are in the order of the files."""
    for part, found in pictures.items():
        for index, picture in enumerate(found):
            sets.write(root / part / picture.label / f"s{index // 5:03}" / picture.name, picture.content)
    return root


def super_classes(pictures, root):
    for part, found in pictures.items():
        for picture in found:
            sets.write(root / part / picture.label[0] / picture.label / picture.name, picture.content)
    return root


def folders_of_parquet(pictures, root):
    """<config>/<split>/0000.parquet, as the Hub converts data sets."""
    import pyarrow.parquet as pq

    for part, found in pictures.items():
        (root / "plain_text" / part).mkdir(parents=True)
        pq.write_table(sets.hub_table(found, sets.classes_of(pictures)), root / "plain_text" / part / "0000.parquet")
    return root


def plain_bytes(pictures, root):
    """Parquet of other tools: bytes and the class as text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    for part, found in pictures.items():
        columns = {"jpg": [p.content for p in found], "class": [p.label for p in found], "width": [8.0] * len(found)}
        pq.write_table(pa.table(columns), root / f"{part}.parquet")
    return root


def one_csv(pictures, root):
    """One CSV with paths and a column that says the split, as CUB or ISIC in many a repository."""
    rows = ["file_name;species;split"]
    for part, found in pictures.items():
        for picture in found:
            sets.write(root / "images" / picture.name, picture.content)
            rows.append(f"images/{picture.name};{picture.label};{part}")
    sets.write(root / "metadata.csv", "\ufeff" + "\r\n".join(rows))
    return root


LAYOUTS = {
    "one folder down": below_one_folder,
    "Kaggle's parts": kaggle_parts,
    "nested": nested,
    "levels": super_classes,
    "zip": lambda pictures, root: sets.as_zip(pictures, root.with_suffix(".zip")),
    "stored zip": lambda pictures, root: sets.as_zip(pictures, root.with_suffix(".zip"), method=0, top="a/b/"),
    "tar": lambda pictures, root: sets.as_tar(pictures, root.with_suffix(".tar"), top="./top/"),
    "Parquet": sets.as_parquet,
    "Parquet by folder": folders_of_parquet,
    "Parquet of plain bytes": plain_bytes,
    "Arrow": sets.as_saved_to_disk,
    "WebDataset": lambda pictures, root: sets.as_webdataset(pictures, root, per_shard=5, named=True),
    "WebDataset with JSON": lambda pictures, root: sets.as_webdataset(pictures, root, suffix="json", named=True),
    "Tiny-ImageNet": sets.as_tiny_imagenet,
    "CSV by part": sets.as_csv,
    "one CSV": one_csv,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The arrays of the plain tree, by size."""
    directory = tmp_path_factory.mktemp("tree")
    root = sets.as_tree(PICTURES, directory / "images")
    for size in (8, 96):
        prepare("folder", root, size, directory / str(size))
    return {size: sets.arrays(directory / str(size)) for size in (8, 96)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_arrays_of_the_plain_tree(tmp_path, expected, layout):
    root = LAYOUTS[layout](PICTURES, tmp_path / "images")
    level = 2 if layout == "levels" else 1
    for size, arrays in expected.items():
        data = prepare("folder", root, size, tmp_path / str(size), label_level=level)
        assert sets.arrays(tmp_path / str(size)) == arrays
        assert str(tmp_path) not in data.source and data.counts == {"train": 33, "validation": 3, "test": 12}


@pytest.mark.parametrize("layout", ["zip", "tar", "Parquet", "Arrow", "WebDataset"])
@pytest.mark.slow
def test_workers_read_it_too(tmp_path, expected, layout, monkeypatch):
    from effvit.data.preparing import shards

    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    root = LAYOUTS[layout](PICTURES, tmp_path / "images")
    prepare("folder", root, 8, tmp_path / "out", workers=2)
    assert sets.arrays(tmp_path / "out") == expected[8]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_part_of_ones_own_is_used_in_every_layout(tmp_path, layout):
    if layout in ("Kaggle's parts", "Tiny-ImageNet"):
        pytest.skip("has no third part")
    source = folder(LAYOUTS[layout](ALL, tmp_path / "x"), 8, Choices(label_level=2 if layout == "levels" else 1))
    content = [source.train.images.read(row) for row in range(len(source.train.images))]
    held_out = set(source.validation.tolist())
    parts = {
        "val": [content[row] for row in source.validation],
        "train": [content[row] for row in range(len(content)) if row not in held_out],
        "test": [source.test.images.read(row) for row in range(len(source.test.images))],
    }
    for part, found in parts.items():
        assert found == [picture.content for picture in ALL[part]]
    labels = [source.classes[label] for label in source.train.labels]
    assert labels == [picture.label for part in ("train", "val") for picture in ALL[part]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_are_chosen_in_every_layout(tmp_path, layout):
    (tmp_path / "list").write_text("cat\nant\n")
    choices = Choices(tmp_path / "list", label_level=2 if layout == "levels" else 1)
    source = folder(LAYOUTS[layout](PICTURES, tmp_path / "x"), 8, choices)
    for split, part in ((source.train, "train"), (source.test, "val")):
        found = [(split.labels[row], split.images.read(row)) for row in range(len(split.labels))]
        chosen = [p for p in PICTURES[part] if p.label != "bee"]
        assert found == [(["ant", "cat"].index(picture.label), picture.content) for picture in chosen]


def test_names_of_images_lead_to_them(tmp_path):
    import pyarrow.parquet as pq

    tree = folder(sets.as_tree(PICTURES, tmp_path / "tree"), 8).train.images
    assert (tree.root / tree.name(7)).read_bytes() == tree.read(7)
    rows = folder(sets.as_parquet(PICTURES, tmp_path / "hub"), 8).train.images
    for index in (0, 17, 18, 35):
        file, _, row = rows.name(index).rstrip("]").rpartition("[")
        table = pq.read_table(rows.root / file)
        assert table["image"][int(row)].as_py()["bytes"] == rows.read(index)
    shard = folder(sets.as_webdataset(PICTURES, tmp_path / "shards", per_shard=5), 8).train.images
    archive, _, member = shard.name(8).partition("/")
    with tarfile.open(shard.root / archive) as tar:
        assert tar.extractfile(member).read() == shard.read(8)


@pytest.mark.slow
def test_real_images_give_the_same_arrays_in_every_layout(tmp_path):
    archive = SHARED / "tiny-imagenet-100.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there (EFFVIT_SHARED names its folder)")
    found = {"train": Counter(), "val": Counter()}
    pictures = {part: [] for part in found}
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            part, label, name = member.name.split("/")
            if label in sorted(found["train"])[:3] or len(found["train"]) < 3:
                found[part][label] += 1
                if found[part][label] <= 30:
                    pictures[part].append(sets.Picture(label, name, tar.extractfile(member).read()))
    pictures = {part: sorted(pictures[part]) for part in pictures}
    assert [len(pictures[part]) for part in ("train", "val")] == [90, 90]
    prepare("folder", sets.as_tree(pictures, tmp_path / "tree"), 64, tmp_path / "expected")
    for layout in ("Parquet", "WebDataset", "Tiny-ImageNet", "zip"):
        prepare("folder", LAYOUTS[layout](pictures, tmp_path / layout), 64, tmp_path / "out")
        assert sets.arrays(tmp_path / "out") == sets.arrays(tmp_path / "expected"), layout
    assert np.load(tmp_path / "out" / "train_images.npy").std() > 30


def test_names_are_below_the_root_that_was_given(tmp_path):
    sets.as_tree(PICTURES, tmp_path / "a" / "b")
    sets.as_parquet(PICTURES, tmp_path / "c" / "d")
    for root, name in (
        ("a", "b/train/ant/ant_train_000.png"),
        ("c", "d/data/train-00000-of-00002.parquet[0]"),
    ):
        images = folder(tmp_path / root, 8).train.images
        assert (images.root, images.name(0)) == (tmp_path / root, name)
