"""Archives are unpacked only where they hold plain files, in plain places, of no more than the expected size."""

import gzip
import io
import platform
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from effvit.errors import UserError

_MARGIN_BYTES = 2**20  # headers and padding


def extract(archive: Path, directory: Path, largest: int) -> None:
    """Unpack a ``.tar.gz`` into ``directory``.

    Args:
        archive: nothing in it is trusted.
        directory: must exist. After an error it may hold some of the files.
        largest: bytes that the files may have together.

    Raises:
        UserError: the archive is damaged; a member leads out of ``directory``, is a link, a device or anything else
            but a file or a folder; a file has the name of a folder, or is to hold others; there is more in it than
            ``largest`` bytes, as declared or as unpacked; this Python does not have ``tarfile``'s filters.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{archive}: Python {platform.python_version()} cannot extract it safely, expected 3.10.12, 3.11.4, 3.12 "
            "or later"
        )
    try:
        with gzip.open(archive) as unpacked, tarfile.open(fileobj=_Limited(unpacked, largest), mode="r|") as tar:
            for member in _checked(tar, largest):
                _extract(tar, member, directory)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, _TooLarge) as error:
        raise UserError(f"{archive}: refused to extract it ({error})") from error


def leads_out(name: str) -> bool:
    """Whether the name of a member leads out of the folder that the archive is unpacked to, on any system."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1])  # "." has no parts


def _checked(tar: tarfile.TarFile, largest: int) -> Iterator[tarfile.TarInfo]:
    total = 0
    for member in tar:
        if leads_out(member.name):
            raise tarfile.TarError(f"{member.name!r} leads out of its folder")
        if not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} is neither a file nor a folder")
        total += member.size
        if total > largest:
            raise _TooLarge(f"more than the {largest:,} bytes expected")
        yield member


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> None:
    try:
        tar.extract(member, directory, filter="data")
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise tarfile.TarError(f"{member.name!r} needs a folder where there is a file, or the reverse") from error


class _TooLarge(Exception):
    pass


class _Limited(io.RawIOBase):
    """A stream that ends in an error where it is asked for more than it may give, before it is unpacked."""

    def __init__(self, stream: gzip.GzipFile, largest: int) -> None:
        self._stream = stream
        self._left = largest + _MARGIN_BYTES
        self._largest = largest

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._left:
            raise _TooLarge(f"more than the {self._largest:,} bytes expected")
        data = self._stream.read(size)
        self._left -= len(data)
        return data
