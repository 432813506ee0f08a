"""Byte-identical images in two parts or two classes are counted and listed."""

import csv
import hashlib
import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from effvit.data.preparing import prepare, shards
from effvit.data.preparing.writer import write_prepared
from effvit.data.sources.base import Source, Split

OTHER_PART, OTHER_CLASS = (f"byte-identical to an image of another {what}" for what in ("part", "class"))


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(20):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{index:02}.png")
    return tmp_path / "images"


def listed(directory):
    with (directory / "duplicates.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def notes(directory):
    return json.loads((directory / "meta.json").read_text())["notes"]


def part_of(directory, root):
    """Each file's part, as the indices of the prepared data set give it."""
    files = sorted((root / "train").glob("*/*"))
    held_out = set(np.load(directory / "validation_indices.npy").tolist())
    parts = {f"train/{p.parent.name}/{p.name}": "validation" if i in held_out else "train" for i, p in enumerate(files)}
    return parts | {f"test/{p.parent.name}/{p.name}": "test" for p in (root / "test").glob("*/*")}


def by_brute_force(directory, root):
    """Groups of files with the same SHA-256 in more than one part or class."""
    groups = defaultdict(set)
    for name, part in part_of(directory, root).items():
        groups[hashlib.sha256((root / name).read_bytes()).digest()].add((part, name.split("/")[1], name))
    return {
        frozenset(group)
        for group in groups.values()
        if len({row[0] for row in group}) > 1 or len({row[1] for row in group}) > 1
    }


@pytest.mark.parametrize("size", [16, 96])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_what_is_in_two_parts_or_two_classes_is_found_as_by_brute_force(tmp_path, tree, monkeypatch, size, workers):
    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    for source, copies in {
        "train/cat/00.png": ["test/cat/05.png"],
        "train/cat/01.png": ["train/dog/01.png"],
        "train/cat/02.png": ["train/cat/03.png"],  # of one class; in one part, if not held out
        "train/cat/04.png": ["train/cat/05.png", "train/dog/05.png", "test/dog/05.png"],
    }.items():
        for copy in copies:
            shutil.copy(tree / source, tree / copy)
    prepare("folder", tree, size, tmp_path / "out", workers=workers)
    groups = defaultdict(set)
    for group, *row in listed(tmp_path / "out"):
        groups[group].add(tuple(row))
    expected = by_brute_force(tmp_path / "out", tree)
    assert len(expected) >= 3 and {frozenset(group) for group in groups.values()} == expected
    counted = notes(tmp_path / "out")
    for what, column in ((OTHER_PART, 0), (OTHER_CLASS, 1)):
        images = [row for group in expected if len({r[column] for r in group}) > 1 for row in group]
        in_test = sum(row[0] == "test" for row in images)
        assert counted["train"][what] == len(images) - in_test and counted["test"][what] == in_test


def test_images_that_are_all_different_make_no_list(tmp_path, tree):
    prepare("folder", tree, 8, tmp_path / "out")
    assert not (tmp_path / "out" / "duplicates.csv").exists()
    assert notes(tmp_path / "out") == {"train": {}, "test": {}}


def test_copies_within_one_class_and_part_are_no_fault(tmp_path, tree):
    for index in range(1, 20):
        shutil.copy(tree / "test/cat/00.png", tree / f"test/cat/{index:02}.png")
    prepare("folder", tree, 8, tmp_path / "out")
    assert not (tmp_path / "out" / "duplicates.csv").exists()


def test_images_that_come_as_arrays_are_named_by_their_number(tmp_path):
    labels = np.repeat(np.arange(2), 15)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    pixels[30 + 3] = pixels[2]
    halves = (Split(labels, pixels[:30]), Split(labels, pixels[30:]))
    write_prepared(Source("a test", ("a", "b"), *halves), "x", 8, tmp_path / "out")
    assert listed(tmp_path / "out") == [("0", "train", "a", "train[2]"), ("0", "test", "a", "test[3]")]
    assert notes(tmp_path / "out") == {"train": {OTHER_PART: 1}, "test": {OTHER_PART: 1}}


def test_an_interrupted_preparation_still_finds_them(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    shutil.copy(tree / "train/cat/00.png", tree / "test/cat/05.png")
    prepare("folder", tree, 16, tmp_path / "whole")
    write = shards.Shard.write

    def stop_at_the_last(self, on_image):
        if self.stored == "test":
            raise KeyboardInterrupt
        return write(self, on_image)

    monkeypatch.setattr(shards.Shard, "write", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        prepare("folder", tree, 16, tmp_path / "out")
    monkeypatch.setattr(shards.Shard, "write", write)
    prepare("folder", tree, 16, tmp_path / "out")
    assert listed(tmp_path / "out") == listed(tmp_path / "whole")
