import gzip
import io
import tarfile

import pytest

from effvit.data.sources.archive import extract
from effvit.errors import UserError

LARGEST = 10_000


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def pack(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def header_alone(path, size):
    """An archive of a few bytes whose one member says that it has ``size``."""
    info = tarfile.TarInfo("large")
    info.size = size
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))


def long_name(path, size):
    """A name of ``size`` bytes, which a reader takes into memory before it knows any member: 1,000 times compressed."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + b"a" * size)


def extended_header(path, size):
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a" * size}) as tar:
        tar.addfile(*member("small"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "unpacked").mkdir()
    return tmp_path / "unpacked"


def test_plain_files_and_folders_are_unpacked(tmp_path, folder):
    path = pack(tmp_path / "a.tar.gz", member("sub", type=tarfile.DIRTYPE, mode=0o755), member("sub/file", b"x" * 9000))
    extract(path, folder, LARGEST)
    assert (folder / "sub" / "file").read_bytes() == b"x" * 9000


def test_archive_of_the_current_folder_is_unpacked(tmp_path, folder):
    names = ("./", "", "./sub")
    folders = [member(name, type=tarfile.DIRTYPE, mode=0o755) for name in names]
    path = pack(tmp_path / "a.tar.gz", *folders, member("./sub/file", b"x"))
    extract(path, folder, LARGEST)
    assert (folder / "sub" / "file").read_bytes() == b"x"


@pytest.mark.parametrize(
    "members",
    [
        [member("a", b"x"), member("a/b", b"x")],
        [member("a/b", b"x"), member("a", b"x")],
        [member("./", b"x")],
        [member("", b"x")],
    ],
)
def test_file_in_the_place_of_a_folder_is_refused(tmp_path, folder, members):
    path = pack(tmp_path / "odd.tar.gz", *members)
    with pytest.raises(
        UserError, match=r"odd\.tar\.gz: refused to extract it \('.*' needs a folder where there is a file"
    ):
        extract(path, folder, LARGEST)


@pytest.mark.parametrize(
    ("evil", "reason"),
    [
        (member("../outside", b"x"), "leads out"),
        (member("sub/../../outside", b"x"), "leads out"),
        (member("/tmp/effvit-outside", b"x"), "leads out"),
        (member("..\\outside", b"x"), "leads out"),
        (member("C:\\outside", b"x"), "leads out"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "neither a file"),
        (member("link", type=tarfile.SYMTYPE, linkname="good"), "neither a file"),
        (member("link", type=tarfile.LNKTYPE, linkname="good"), "neither a file"),
        (member("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "neither a file"),
        (member("pipe", type=tarfile.FIFOTYPE), "neither a file"),
        (member("large", b"\0" * (LARGEST + 1)), "more than the 10,000 bytes"),
    ],
)
def test_evil_member_is_refused_and_nothing_of_it_is_written(tmp_path, folder, evil, reason):
    path = pack(tmp_path / "evil.tar.gz", member("good", b"fine"), evil)
    with pytest.raises(UserError, match=rf"evil\.tar\.gz: refused to extract it .*{reason}"):
        extract(path, folder, LARGEST)
    assert [path.name for path in folder.iterdir()] == ["good"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar.gz", "unpacked"]


@pytest.mark.parametrize("bomb", [header_alone, long_name, extended_header])
def test_bomb_is_refused_before_it_is_unpacked(tmp_path, folder, bomb):
    bomb(tmp_path / "bomb.tar.gz", 50_000_000)
    assert (tmp_path / "bomb.tar.gz").stat().st_size < 100_000
    with pytest.raises(UserError, match="more than the 10,000 bytes expected"):
        extract(tmp_path / "bomb.tar.gz", folder, LARGEST)
    assert list(folder.iterdir()) == []


def test_many_files_count_together(tmp_path, folder):
    path = pack(tmp_path / "many.tar.gz", *(member(f"{i}", b"x" * 3000) for i in range(4)))
    with pytest.raises(UserError, match="more than the 10,000 bytes expected"):
        extract(path, folder, LARGEST)


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no tar at all" * 100)], ids=len)
def test_what_is_no_archive_is_refused(tmp_path, folder, content):
    (tmp_path / "none.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"none\.tar\.gz: refused to extract"):
        extract(tmp_path / "none.tar.gz", folder, LARGEST)


def test_archive_cut_short_is_refused(tmp_path, folder):
    path = pack(tmp_path / "cut.tar.gz", member("file", bytes(range(256)) * 30))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="refused to extract"):
        extract(path, folder, LARGEST)


def test_an_early_python_without_filters_is_told_apart_from_a_damaged_archive(folder, tmp_path, monkeypatch):
    archive = pack(tmp_path / "some.tar.gz", member("file", b"content"))
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(UserError, match=r"some\.tar\.gz: Python .* expected 3\.10\.12, 3\.11\.4, 3\.12 or later"):
        extract(archive, folder, LARGEST)
    assert not any(folder.iterdir())
