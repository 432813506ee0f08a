"""WebDataset shards; labels checked against tarfile read plainly."""

import json
import tarfile

import image_sets as sets
import pytest

from effvit.data.sources.folder import folder
from effvit.data.sources.layout import Choices
from effvit.errors import UserError

PICTURES = sets.make_pictures(train=4, val=2)
PNG = PICTURES["train"][0].content


def by_tarfile(path):
    """Class number and image of each sample, by key."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return [(int(samples[key]["cls"]), samples[key]["png"]) for key in sorted(samples)]


def shard(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            sets.add(tar, name, content)


def test_samples_are_those_that_tarfile_finds(tmp_path):
    root = sets.as_webdataset(PICTURES, tmp_path / "x", per_shard=5)
    source = folder(root, 8)
    for part, split in (("train", source.train), ("val", source.test)):
        expected = [sample for path in sorted(root.glob(f"{part}-*.tar")) for sample in by_tarfile(path)]
        assert [(split.labels[i], split.images.read(i)) for i in range(len(split.labels))] == expected
    assert source.classes == ("0", "1", "2") and source.description == "WebDataset, 5 tar shards"


def test_keys_are_sorted_and_belong_to_their_folder_and_captions_are_no_labels(tmp_path):
    pairs = [("b/1.png", PNG), ("a/1.cls", b"7"), ("a/1.txt", b"a caption"), ("b/1.cls", b"10\n"), ("a/1.png", PNG)]
    for part in ("train", "val"):
        shard(tmp_path / part / "000.tar", ("b", b""), *pairs)
    source = folder(tmp_path, 8)
    assert source.classes == ("7", "10") and source.train.labels.tolist() == [0, 1]
    assert [source.test.images.name(i) for i in range(2)] == ["val/000.tar/a/1.png", "val/000.tar/b/1.png"]


def test_field_of_the_json_can_be_named(tmp_path):
    for part in ("train", "val"):
        fields = ({"label": 0, "species": "fox"}, {"label": 0, "species": "ant"})
        members = [(f"{i}.json", json.dumps(each).encode()) for i, each in enumerate(fields)]
        shard(tmp_path / f"{part}.tar", *members, ("0.png", PNG), ("1.png", PNG))
    assert folder(tmp_path, 8, Choices(label_column="species")).train.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"label_column=specie: .*0\.json has label, species .did you mean species"):
        folder(tmp_path, 8, Choices(label_column="specie"))


def test_one_shard_as_root_is_divided_by_a_share(tmp_path):
    sets.as_webdataset(PICTURES, tmp_path)
    source = folder(tmp_path / "train-000000.tar", 8, Choices(test_share=0.25))
    assert (len(source.train.labels), len(source.test.labels)) == (9, 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.cls", b"0")], r"train\.tar: 1 samples have no image, the first is '1'"),
        (
            [("1.png", PNG), ("1.cls", b"-1"), ("2.png", PNG), ("2.cls", b"2")],
            r"train\.tar/1\.png: 1 images of train have",
        ),
        ([("1.png", PNG)], r"train\.tar/1\.png: 1 images of train have no label"),
        ([("1.png", PNG), ("1.jpg", PNG), ("1.cls", b"0")], "sample '1' has two images"),
        ([("1.png", PNG), ("1.cls", b"")], r"1\.cls: expected a label, as number or name"),
        ([("1.png", PNG), ("1.cls", b"\xff")], r"1\.cls: expected a label"),
        ([("1.png", PNG), ("1.json", b"[" * 100_000)], r"1\.json: expected a label"),
        ([("1.png", PNG), ("1.cls", "\u00b2".encode())], "some labels are numbers and some are names"),
        ([("1.png", PNG), ("1.json", b"[1]")], r"1\.json: expected a label"),
        ([("1.png", PNG), ("1.json", b'{"label": [0, 1]}')], r"1\.json: the label is \[0, 1\], expected one class"),
        ([("1.png", PNG), ("1.cls", b"cat")], "some labels are numbers and some are names"),
        ([("../1.png", PNG), ("../1.cls", b"0")], "leads out of its folder"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named(tmp_path, members, message):
    good = [("0.png", PNG), ("0.cls", b"0")]
    shard(tmp_path / "train.tar", *good, *members)
    shard(tmp_path / "val.tar", *good)
    with pytest.raises(UserError, match=message):
        folder(tmp_path, 8)


def test_shard_of_no_split_is_named(tmp_path):
    for name in ("train", "other"):
        shard(tmp_path / f"{name}.tar", ("0.png", PNG), ("0.cls", b"0"))
    with pytest.raises(UserError, match=r"other\.tar does not say which split it is"):
        folder(tmp_path, 8)


@pytest.mark.parametrize("keep", [0, 100, 700, 1700, -11000])
def test_shard_cut_short_is_named(tmp_path, keep):
    sets.as_webdataset(PICTURES, tmp_path)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train-000000\.tar: damaged or unsafe tar archive"):
        folder(tmp_path, 8)


def test_damaged_header_does_not_hide_the_rest(tmp_path):
    sets.as_webdataset(PICTURES, tmp_path)
    path = tmp_path / "train-000000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[10].offset
    content[at : at + 300] = b"x" * 300
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train-000000\.tar: damaged .*no header at byte {at:,}"):
        folder(tmp_path, 8)


def test_shard_without_labels_does_not_hide_validation(tmp_path):
    good = [member for i in range(4) for member in ((f"{i}.png", PNG), (f"{i}.cls", b"%d" % (i % 2)))]
    for test in ([("0.png", PNG)], [("0.png", PNG), ("0.cls", b"-1")], [("0.png", PNG), ("0.json", b"{}")]):
        for place in ("{}.tar", "{}/0.tar"):
            for part, members in (("train", good), ("val", good), ("test", test)):
                shard(tmp_path / place.format(part), *members)
            source = folder(tmp_path, 8)
            assert source.test.images.name(0).startswith("val") and source.validation is None
            assert source.description == "WebDataset, 3 tar shards, test not read (1 images without labels)"
            for part in ("train", "val", "test"):
                (tmp_path / place.format(part)).unlink()


def test_tar_of_folders_with_a_json_is_no_shard(tmp_path):
    root = sets.as_tar(PICTURES, tmp_path / "x.tar")
    with tarfile.open(root, "a") as tar:
        sets.add(tar, "Labels.json", b"{}")
    assert folder(root, 8).classes == ("ant", "bee", "cat")


def test_field_is_named_for_a_single_shard_too(tmp_path):
    fields = [json.dumps({"label": 0, "kind": "ab"[i % 2]}).encode() for i in range(8)]
    members = [pair for i, each in enumerate(fields) for pair in ((f"{i}.png", PNG), (f"{i}.json", each))]
    shard(tmp_path / "x.tar", *members)
    assert folder(tmp_path / "x.tar", 8, Choices(test_share=0.25, label_column="kind")).classes == ("a", "b")


def test_litter_in_a_shard_is_counted_and_left_out(tmp_path):
    members = [("./a/1.png", PNG), ("./a/._1.png", b"x"), ("./a/1.cls", b"0"), ("a/2.png", PNG), ("a/2.cls", b"1")]
    for part in ("train", "val"):
        shard(tmp_path / f"{part}.tar", *members, (".cache/3.png", PNG))
    source = folder(tmp_path, 8)
    assert len(source.train.labels) == 2 and source.train.notes == {"stray files ignored": 2}


def test_shards_joined_into_one_file_are_refused(tmp_path):
    sets.as_webdataset(PICTURES, tmp_path, per_shard=5)
    first, second = tmp_path / "train-000000.tar", tmp_path / "train-000001.tar"
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"train-000000\.tar: .*more follows after its end, as in archives joined"):
        folder(tmp_path, 8)


def test_shard_that_ends_after_a_member_is_refused(tmp_path):
    sets.as_webdataset(PICTURES, tmp_path)
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(UserError, match=r"train-000000\.tar: .*no mark of its end"):
        folder(tmp_path, 8)


def test_missing_shard_is_named(tmp_path):
    for name in ("train-0-of-2", "val-0-of-1"):
        shard(tmp_path / f"{name}.tar", ("0.png", PNG), ("0.cls", b"0"))
    with pytest.raises(UserError, match=r"train-1-of-2\.tar: is missing, and 1 of its 2 parts are there"):
        folder(tmp_path, 8)
