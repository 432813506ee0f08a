"""Images in tar and zip archives, read in place: nothing is unpacked, and nothing in an archive is trusted."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from effvit.data.sources.archive import leads_out
from effvit.data.sources.base import stamp_of
from effvit.data.sources.reading import reading
from effvit.errors import UserError

LARGEST_MEMBER = 2**28
"""Bytes of one image in an archive, which is read as a whole."""
_BLOCK, _CHUNK = 512, 2**20  # bytes of a tar
_LARGEST_RATIO, _ALWAYS_ALLOWED = 100, 2**30  # of a zip's declared content; images hardly shrink
_LOCAL_HEADER = b"PK\3\4"
_LOCAL_BYTES = 30
_UNIX, _TYPE, _LINK = 3, 0o170000, 0o120000
_ENCRYPTED, _UTF8 = 1, 0x800  # flags of a zip


class TooLarge(UserError):
    """A member of an archive is larger than `LARGEST_MEMBER`."""


class Member(NamedTuple):
    """A file in an archive; ``place`` are the numbers that `TarMembers` or `ZipMembers` finds it by."""

    name: str
    place: tuple[int, ...]


@dataclass(frozen=True)
class TarMembers:
    """Files in tar archives: ``places`` is int64 ``(n, 3)``: archive, offset, bytes."""

    root: Path
    archives: tuple[str, ...]
    names: tuple[str, ...]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return "/".join(filter(None, (self.archives[self.places[index, 0]], self.names[index])))

    def read(self, index: int) -> bytes:
        archive, offset, size = self.places[index].tolist()
        with (self.root / self.archives[archive]).open("rb") as file:
            return _read_at(file, offset, size, self.root / self.name(index))

    def take(self, rows: np.ndarray) -> "TarMembers":
        return TarMembers(self.root, self.archives, tuple(self.names[row] for row in rows), self.places[rows])

    def stamp(self) -> list[Any]:
        used = np.unique(self.places[:, 0]).tolist()
        archives = [stamp_of(self.root, self.archives[number]) for number in used]
        return [str(self.root.absolute()), archives, self.names, self.places.tolist()]


@dataclass(frozen=True)
class ZipMembers:
    """Files in a zip archive: ``places`` is int64 ``(n, 5)``: offset of the header, compressed, bytes, method, CRC."""

    root: Path
    names: tuple[str, ...]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        path, place = self.root / self.names[index], self.places[index].tolist()
        with self.root.open("rb") as file:
            return read_zipped(file, tuple(place), path)

    def take(self, rows: np.ndarray) -> "ZipMembers":
        return ZipMembers(self.root, tuple(self.names[row] for row in rows), self.places[rows])

    def stamp(self) -> list[Any]:
        return [str(self.root.absolute()), stamp_of(self.root, ""), self.names, self.places.tolist()]


def list_tar(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yield the files of a tar, or of one that is stored in another from ``start`` on; places are ``(offset, bytes)``.

    Folders are yielded with a slash at the end.

    Raises:
        UserError: it is cut short or damaged; a member is a link, a device or in pieces, or leads out of its folder.
    """
    with path.open("rb") as file, reading(path, "damaged or unsafe tar archive"):
        end = start + size if size is not None else file.seek(0, io.SEEK_END)
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or they would pile up: a kilobyte each
                yield _checked_member(member, end)
            _check_end(file, tar.offset, end)


def _check_end(file: IO[bytes], at: int, end: int) -> None:
    """Raise ``TarError`` unless from byte ``at`` on there are zeros, and no less than a block: the mark of the end."""
    file.seek(at)
    if file.read(min(_BLOCK, max(end - at, 0))).strip(b"\0"):
        raise tarfile.TarError(f"no header at byte {at:,}")
    if at >= end:
        raise tarfile.TarError("it has no mark of its end, as one that is cut short")
    while (left := end - file.tell()) > 0 and (chunk := file.read(min(_CHUNK, left))):
        if chunk.strip(b"\0"):
            raise tarfile.TarError("more follows after its end, as in archives joined into one file")


def _checked_member(member: tarfile.TarInfo, end: int) -> Member:
    if leads_out(member.name):
        raise tarfile.TarError(f"{member.name!r} leads out of its folder")
    if member.isdir():
        return Member(f"{member.name}/", (0, 0))
    if not member.isfile() or member.sparse is not None:
        raise tarfile.TarError(f"{member.name!r} is neither a plain file nor a folder")
    if member.offset_data + member.size > end:
        raise tarfile.TarError(f"{member.name!r} is cut short")
    return Member(member.name, (member.offset_data, member.size))


def list_zip(path: Path) -> Iterator[Member]:
    """Yield the files of a zip; folders with a slash at the end.

    Raises:
        UserError: it is damaged or declares far more than it can hold; a member is a link or encrypted, needs another
            method than deflate, or leads out of its folder.
    """
    with reading(path, "damaged zip archive"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > max(_ALWAYS_ALLOWED, _LARGEST_RATIO * path.stat().st_size):
        raise UserError(f"{path}: refused, as it declares {total:,} bytes in an archive of {path.stat().st_size:,}")
    for member in members:
        if problem := _problem_of(member):
            raise UserError(f"{path}: refused to read it ({member.filename!r} {problem})")
        yield Member(
            _name_of(member),
            (member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC),
        )


def _name_of(member: zipfile.ZipInfo) -> str:
    """The name in UTF-8, which many programs write without the flag that says so; else in DOS's code page."""
    if not member.flag_bits & _UTF8:
        with suppress(UnicodeError):
            return member.filename.encode("cp437").decode("utf-8")
    return member.filename


def _problem_of(member: zipfile.ZipInfo) -> str | None:
    if leads_out(member.filename):
        return "leads out of its folder"
    if member.create_system == _UNIX and (member.external_attr >> 16) & _TYPE == _LINK:
        return "is a link"
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted; unpack it first"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {member.compress_type}, which is not read in place; unpack it first"
    return None


def read_zipped(file: IO[bytes], place: tuple[int, ...], path: Path) -> bytes:
    """Read a file of a zip archive that `list_zip` found at ``place``; ``path`` names it in an error.

    Raises:
        UserError: it is damaged, or holds more than it declares or than `LARGEST_MEMBER`.
    """
    offset, packed, size, method, crc = place
    header = _read_at(file, offset, _LOCAL_BYTES, path)
    if not header.startswith(_LOCAL_HEADER):
        raise UserError(f"{path}: damaged archive (no header at byte {offset:,}); fetch or make it again")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    content = _read_at(file, offset + _LOCAL_BYTES + name + extra, packed, path)
    if method == zipfile.ZIP_DEFLATED:
        _check_size(size, path)
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error as error:
            raise UserError(f"{path}: damaged in its archive ({error})") from error
    if len(content) != size or zlib.crc32(content) != crc:
        raise UserError(f"{path}: damaged in its archive (not the size or checksum that it declares)")
    return content


def _read_at(file: IO[bytes], offset: int, size: int, path: Path) -> bytes:
    _check_size(size, path)
    if min(offset, size) < 0:
        raise UserError(f"{path}: damaged archive (bytes {offset} on); fetch or make it again")
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise UserError(f"{path}: its archive is cut short; fetch or make it again")
    return content


def _check_size(size: int, path: Path) -> None:
    if size > LARGEST_MEMBER:
        raise TooLarge(f"{path}: has {size:,} bytes, more than the {LARGEST_MEMBER:,} allowed in an archive")
