"""Folders and files, whether they are on disk or in an archive."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO

from effvit.data.sources.base import Files, Originals
from effvit.errors import UserError

_LITTER = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "#recycle",
    "lost+found",
    "$recycle.bin",
    "system volume information",
}


class Kind(Enum):
    """What an entry of a folder is; a link is one that leads nowhere, as any other is what it leads to."""

    FILE = auto()
    FOLDER = auto()
    LINK = auto()
    OTHER = auto()


@dataclass(frozen=True)
class Entry:
    """A name in a folder."""

    name: str
    kind: Kind


class Tree(ABC):
    """Folders and files below ``root``. Paths are relative to it, with slashes; the root itself is ``""``."""

    root: Path
    """What messages name: a directory, or an archive and a folder in it."""

    @abstractmethod
    def scan(self, path: str = "") -> list[Entry]:
        """All entries of a folder, in the order of their names; of none where there is no such folder."""

    @abstractmethod
    def open(self, path: str) -> IO[bytes]:
        """Open a file."""

    @abstractmethod
    def originals(self, paths: Sequence[str]) -> Originals:
        """Images in files of the tree, in the order of ``paths``."""

    @abstractmethod
    def within(self, path: str) -> "Tree":
        """The tree below one of its folders."""

    def entries(self, path: str = "", notes: Counter[str] | None = None) -> list[Entry]:
        """Entries of a folder without what systems strew about, which is counted in ``notes``."""
        found = self.scan(path)
        kept = [entry for entry in found if not is_litter(entry.name)]
        if notes is not None and len(kept) < len(found):
            notes["stray files ignored"] += len(found) - len(kept)
        return kept

    def folders(self, path: str = "") -> list[str]:
        """Names of the folders in a folder.

        Raises:
            UserError: one is a link that leads nowhere, so that it cannot be known what was meant.
        """
        found = self.entries(path)
        for entry in found:
            if entry.kind is Kind.LINK:
                raise UserError(f"{self.root / path / entry.name}: a link that leads nowhere; mend or remove it")
        return [entry.name for entry in found if entry.kind is Kind.FOLDER]

    def files(self, path: str = "") -> list[str]:
        """Names of the files in a folder."""
        return [entry.name for entry in self.entries(path) if entry.kind is Kind.FILE]

    def has(self, path: str) -> bool:
        """Whether there is a file of that path."""
        folder, _, name = path.rpartition("/")
        return Entry(name, Kind.FILE) in self.scan(folder)

    def read_text(self, path: str) -> str:
        """The content of a text file in UTF-8, with or without a byte order mark."""
        with self.open(path) as file:
            content = file.read()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.root / path}: expected text in UTF-8") from error


def is_litter(name: str) -> bool:
    """Whether a file or folder is one that operating systems and storage servers leave behind."""
    return name.startswith(".") or name.lower() in _LITTER


def is_litter_path(path: str) -> bool:
    """Whether a file, or a folder that it is in, is litter."""
    return any(is_litter(part) for part in path.split("/") if part != ".")


def join(*parts: str) -> str:
    """A path of a tree from its parts, of which any may be empty."""
    return "/".join(filter(None, parts))


@dataclass(frozen=True)
class Directory(Tree):
    """The folder ``prefix`` below ``top``, from which images are named.

    With ``only``, as if there were no more in it than the file of that name.
    """

    top: Path
    prefix: str = ""
    only: str | None = None

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.top / self.prefix

    def scan(self, path: str = "") -> list[Entry]:
        try:
            with os.scandir(self.root / path) as entries:
                found = [Entry(entry.name, _kind(entry)) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted((entry for entry in found if self.only in (None, entry.name)), key=lambda entry: entry.name)

    def has(self, path: str) -> bool:  # without reading a whole folder
        return self.only in (None, path) and (self.root / path).is_file()

    def open(self, path: str) -> IO[bytes]:
        return (self.root / path).open("rb")

    def originals(self, paths: Sequence[str]) -> Files:
        return Files(self.top, tuple(map(self.from_top, paths)))

    def within(self, path: str) -> "Directory":
        return Directory(self.top, self.from_top(path))

    def from_top(self, path: str) -> str:
        """A path of this tree as one below ``top``."""
        return join(self.prefix, path)


def _kind(entry: "os.DirEntry[str]") -> Kind:
    if entry.is_file():
        return Kind.FILE
    if entry.is_dir():
        return Kind.FOLDER
    return Kind.LINK if entry.is_symlink() else Kind.OTHER
