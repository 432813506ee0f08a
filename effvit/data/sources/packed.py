"""Archives as trees: a zip, or a tar that is not compressed, read in place."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from effvit.data.sources.base import Originals
from effvit.data.sources.members import Member, TarMembers, ZipMembers, list_tar, list_zip
from effvit.data.sources.tree import Entry, Kind, Tree, join
from effvit.errors import UserError

_Index = dict[str, dict[str, tuple[int, ...] | None]]
"""Folders by path, each with its names: the place of a file, None for a folder."""


@dataclass(frozen=True, eq=False)
class Packed(Tree):
    """The files of the archive at ``path`` below the folder ``prefix`` in it."""

    path: Path
    index: _Index
    is_zip: bool
    prefix: str = ""

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.path / self.prefix

    def scan(self, path: str = "") -> list[Entry]:
        names = self.index.get(join(self.prefix, path), {})
        return [Entry(name, Kind.FOLDER if names[name] is None else Kind.FILE) for name in sorted(names)]

    def open(self, path: str) -> IO[bytes]:
        return io.BytesIO(self.originals([path]).read(0))

    def originals(self, paths: Sequence[str]) -> Originals:
        names = tuple(join(self.prefix, path) for path in paths)
        places = [self._place(name) for name in names]
        if self.is_zip:
            return ZipMembers(self.path, names, np.array(places, dtype=np.int64).reshape(-1, 5))
        numbered = np.array([(0, *place) for place in places], dtype=np.int64).reshape(-1, 3)
        return TarMembers(self.path, ("",), names, numbered)

    def within(self, path: str) -> "Packed":
        return Packed(self.path, self.index, self.is_zip, join(self.prefix, path))

    def _place(self, name: str) -> tuple[int, ...]:
        folder, _, file = name.rpartition("/")
        place = self.index[folder][file]
        assert place is not None, name
        return place


def open_zip(path: Path) -> Packed:
    """The tree in a zip; raises `UserError` as `list_zip` does, or where two files have one place."""
    return Packed(path, _index(path, list_zip(path)), is_zip=True)


def open_tar(path: Path) -> Packed:
    """The tree in a tar; raises `UserError` as `list_tar` does, or where two files have one place."""
    return Packed(path, _index(path, list_tar(path)), is_zip=False)


def _index(path: Path, members: Iterable[Member]) -> _Index:
    index: _Index = {"": {}}
    for name, place in members:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        folders = parts if name.endswith("/") or not parts else parts[:-1]
        for depth in range(len(folders)):
            siblings = index["/".join(folders[:depth])]
            if siblings.setdefault(folders[depth], None) is not None:
                raise UserError(f"{path}: refused to read it ({name!r} needs a folder where there is a file)")
            index.setdefault("/".join(folders[: depth + 1]), {})
        if folders is not parts:
            siblings = index["/".join(folders)]
            if parts[-1] in siblings:
                raise UserError(f"{path}: refused to read it ({name!r} is there twice)")
            siblings[parts[-1]] = place
    return index
