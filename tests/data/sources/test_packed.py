"""Zip and tar as roots, read in place; what they hold is not trusted."""

import io
import struct
import tarfile
import zipfile

import image_sets as sets
import numpy as np
import pytest

from effvit.data.preparing import prepare
from effvit.data.sources import members
from effvit.data.sources.folder import folder
from effvit.data.sources.packed import open_tar, open_zip
from effvit.errors import UserError

PICTURES = sets.make_pictures(train=4, test=2)
PNG = PICTURES["train"][0].content


def zipped(path, *names, **fields):
    """A zip with the pictures, and more members, the last one with the fields of its `ZipInfo` set."""
    sets.as_zip(PICTURES, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.writestr(info, PNG)
    return path


def tarred(path, name, **fields):
    sets.as_tar(PICTURES, path)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(PNG) if "type" not in fields else 0
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(PNG))
    return path


@pytest.mark.parametrize("name", ["../x.png", "train/../../x.png", "/tmp/x.png", "..\\x.png", "C:\\x.png"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    zipfile_path = zipped(tmp_path / "a.zip", name)
    for path in (zipfile_path, tarred(tmp_path / "a.tar", name)):
        with pytest.raises(UserError, match=rf"{path.name}: .*leads out of its folder"):
            folder(path, 8)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (lambda t: zipped(t / "a.zip", "train/ant/l.png", create_system=3, external_attr=0o120777 << 16), "is a link"),
        (lambda t: zipped(t / "a.zip", "train/ant/l.png", compress_type=zipfile.ZIP_LZMA), "compressed by method 14"),
        (lambda t: zipped(t / "a.zip", "train/ant"), "needs a folder where|is there twice"),
        (lambda t: zipped(t / "a.zip", "train/ant/a.png/b.png", "train/ant/a.png"), "is there twice"),
        (lambda t: zipped(t / "a.zip", "train/ant/a.png", "train/ant/a.png/b.png"), "needs a folder where"),
        (lambda t: tarred(t / "a.tar", "train/ant/l.png", type=tarfile.SYMTYPE, linkname="x"), "neither a plain file"),
        (lambda t: tarred(t / "a.tar", "train/ant/l.png", type=tarfile.LNKTYPE, linkname="x"), "neither a plain file"),
        (lambda t: tarred(t / "a.tar", "train/ant/l.png", type=tarfile.FIFOTYPE), "neither a plain file"),
        (lambda t: tarred(t / "a.tar", "./train/ant/ant_train_000.png"), "is there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_no_plain_file_of_its_own_is_refused(tmp_path, path, match):
    with pytest.raises(UserError, match=match):
        folder(path(tmp_path), 8)


def test_encrypted_member_is_refused(tmp_path):
    path = sets.as_zip(PICTURES, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    content[at + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip: refused .*is encrypted; unpack it first"):
        folder(path, 8)


def test_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "_ALWAYS_ALLOWED", 10**6)
    path = sets.as_zip(PICTURES, tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/ant/zeros.bmp", b"\0" * 20_000_000)
    with pytest.raises(UserError, match=r"a\.zip: refused, as it declares 20,\d{3},\d{3} bytes in an archive of"):
        folder(path, 8)


def test_member_larger_than_any_image_is_refused_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "LARGEST_MEMBER", 1000)
    for path in (sets.as_zip(PICTURES, tmp_path / "a.zip"), sets.as_tar(PICTURES, tmp_path / "a.tar")):
        big = open_zip(path) if path.suffix == ".zip" else open_tar(path)
        lot = big.originals(["train/ant/ant_train_000.png"])
        lot.places[0, 2] = 1001
        with pytest.raises(UserError, match=r"ant_train_000\.png: has 1,001 bytes, more than the 1,000 allowed"):
            lot.read(0)


def test_member_that_holds_more_than_it_declares_is_refused(tmp_path):
    path = sets.as_zip({"train": [sets.Picture("a", "1.png", b"\0" * 5000)]}, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    struct.pack_into("<I", content, at + 24, 100)  # its size
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1\.png: damaged in its archive"):
        open_zip(path).originals(["train/a/1.png"]).read(0)


def test_flipped_bit_in_a_zip_is_found_and_the_image_named(tmp_path):
    path = sets.as_zip(PICTURES, tmp_path / "a.zip", method=0)
    content = bytearray(path.read_bytes())
    content[content.index(PICTURES["train"][5].content) + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.zip/train/bee/{PICTURES['train'][5].name}: damaged in its archive"):
        prepare("folder", path, 8, tmp_path / "out")


@pytest.mark.parametrize("keep", [10, 2000, -5000, -30])
def test_archive_cut_short_is_named(tmp_path, keep):
    for path in (sets.as_zip(PICTURES, tmp_path / "a.zip"), sets.as_tar(PICTURES, tmp_path / "a.tar")):
        if path.suffix == ".tar" and keep == -30:
            continue  # no more than padding is lost
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"{path.name}: damaged"):
            folder(path, 8)


def test_negative_place_is_refused(tmp_path):
    lot = open_zip(sets.as_zip(PICTURES, tmp_path / "a.zip")).originals(["train/ant/ant_train_000.png"])
    lot.places[0, 0] = -1
    with pytest.raises(UserError, match=r"ant_train_000\.png: damaged archive"):
        lot.read(0)


def test_archive_that_shrinks_while_it_is_read_is_named(tmp_path):
    for path in (sets.as_zip(PICTURES, tmp_path / "a.zip", method=0), sets.as_tar(PICTURES, tmp_path / "a.tar")):
        source = folder(path, 8)
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(UserError, match=rf"{path.name}/train/cat/.*: its archive is cut short"):
            source.train.images.read(11)


def test_members_are_those_of_zipfile_and_tarfile(tmp_path):
    path = sets.as_zip(PICTURES, tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert [open_zip(path).originals([name]).read(0) for name in names] == [archive.read(name) for name in names]
    path = sets.as_tar(PICTURES, tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        truth = {member.name: tar.extractfile(member).read() for member in tar}
    lot = open_tar(path).originals(list(truth)).take(np.arange(len(truth))[::-1])
    assert {lot.name(row): lot.read(row) for row in range(len(lot))} == truth


class Unflagged(zipfile.ZipInfo):
    """A name in UTF-8 without the flag that says so, as several programs write it."""

    def _encodeFilenameFlags(self):
        return self.filename.encode(), 0


def test_names_in_utf_8_without_the_flag(tmp_path):
    names = ("caf\u00e9", "\u732b", "tea")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for part in ("train", "test"):
            for name in names:
                archive.writestr(Unflagged(f"{part}/{name}/1.png"), PNG)
    assert folder(tmp_path / "a.zip", 8).classes == ("caf\u00e9", "tea", "\u732b")


def test_names_of_dos_stay_as_they_are(tmp_path):
    path = zipped(tmp_path / "a.zip", *(f"{part}/caf_/1.png" for part in ("train", "test")))
    path.write_bytes(path.read_bytes().replace(b"caf_", b"caf\x82"))
    assert folder(path, 8).classes == ("ant", "bee", "caf\u00e9", "cat")


def test_large_file_next_to_the_images_is_ignored_as_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "LARGEST_MEMBER", 20_000)
    path = sets.as_zip(PICTURES, tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/ant/movie.mp4", bytes(20_001))
    source = folder(path, 8)
    assert len(source.train.labels) == 12
    assert [count for what, count in source.train.notes.items() if what.startswith("files that are no")] == [1]


def test_tar_that_continues_after_its_end_is_refused(tmp_path):
    path = sets.as_tar(PICTURES, tmp_path / "a.tar")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match=r"a\.tar: .*more follows after its end"):
        folder(path, 8)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_flipped_bytes_are_one_line_or_change_nothing_that_is_checked(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    (sets.as_zip if kind == "zip" else sets.as_tar)(PICTURES, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    region = range(whole.index(b"PK\1\2"), len(whole)) if kind == "zip" else range(512)
    refused = 0
    for _ in range(100):
        content = bytearray(whole)
        content[rng.choice(region)] = rng.integers(256)
        path.write_bytes(content)
        try:
            folder(path, 8).train.images.read(0)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20
