"""Which image each row of a CSV names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from effvit.data.sources.images import SUFFIXES
from effvit.data.sources.layouts.class_folders import is_image_in
from effvit.data.sources.names import TRAIN, WHOLE, other_form, part_of
from effvit.data.sources.tree import Tree, join
from effvit.errors import UserError

TABLES = (".csv", ".tsv")
_DEPTH = 3


@dataclass(frozen=True)
class Images:
    """Paths of images by folder."""

    folders: Mapping[str, Sequence[str]]

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Of all of them."""
        return tuple(path for paths in self.folders.values() for path in paths)

    @cached_property
    def _by_path(self) -> dict[str, list[str]]:
        """Paths by themselves and by themselves without the suffix."""
        found: dict[str, list[str]] = {path: [path] for path in self.paths}
        for path in self.paths:
            if (stem := _stem(path)) != path and [stem] != found.get(stem):
                found.setdefault(stem, []).append(path)
        return found

    def named(self, names: Sequence[str], near: str, part: str) -> list[list[str]]:
        """For each of ``names`` the images that it may mean: one where all is well.

        A name is a path, with or without suffix, below one folder for all: ``near``, the root, one of ``part``, one of
        no part. Where no such folder has all, each name counts in all of them. Folders of another part never count, as
        the names there are often the same: 1, 2, 3.
        """
        names = [_clean(name) for name in names]
        allowed = (None, part, TRAIN) if part == WHOLE else (None, part)
        own = [folder for folder in self.folders if part_of(folder) in allowed]
        of_part = [folder for folder in own if part_of(folder) == part]
        first = [folder for folder in own if join(folder, names[0]) in self._by_path]
        best: list[list[str]] = [[] for _ in names]
        for folder in dict.fromkeys([near, "", *of_part, *first]):
            found = [self._by_path.get(join(folder, name), []) for name in names]
            if all(found):
                return found
            best = max(best, found, key=_count)
        spread: dict[str, list[str]] = {}
        for path in (path for folder in own for path in self.folders[folder]):
            name = path.rpartition("/")[2]
            for key in {name, _stem(name)}:
                spread.setdefault(key, []).append(path)
        return max(best, [spread.get(name, []) for name in names], key=_count)

    def why_missing(self, name: str) -> str:
        """What to say of a name that no image has."""
        names = [path.rpartition("/")[2] for path in self.paths]
        sought = _clean(name).rpartition("/")[2]
        return f"there is no such image{other_form(sought, [*names, *map(_stem, names)])}"


def find_images(tree: Tree) -> Images:
    """Images at the top and in folders, down to three levels."""
    found: dict[str, list[str]] = {}
    folders = [("", 0)]
    while folders:
        folder, depth = folders.pop()
        paths = [join(folder, name) for name in tree.files(folder)]
        if images := [path for path in paths if not path.lower().endswith(TABLES) and is_image_in(tree, path)]:
            found[folder] = images
        if depth < _DEPTH:
            folders += [(join(folder, name), depth + 1) for name in tree.folders(folder)]
    return Images(found)


def choose_column(
    columns: Mapping[str, Sequence[str]], images: Images, near: str, part: str
) -> tuple[str, list[list[str]]]:
    """Which of several columns has the names of images, and what `Images.named` finds for it.

    Columns of file names with a suffix go before others, which may be numbers of rows.

    Raises:
        UserError: two columns name images, and not the same ones.
    """
    with_suffix = [
        column for column, names in columns.items() if all(name.lower().endswith(tuple(SUFFIXES)) for name in names)
    ]
    found = {column: images.named(columns[column], near, part) for column in with_suffix or columns}
    some = [column for column in found if any(found[column])]
    for column in some[1:]:
        if found[column] != found[some[0]]:
            raise UserError(
                f"the columns {some[0]} and {column} both name images, and not the same ones; image_column=NAME takes "
                "one"
            )
    chosen = (some or list(found))[0]
    return chosen, found[chosen]


def _clean(name: str) -> str:
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _stem(path: str) -> str:
    """A path without its suffix."""
    return path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path


def _count(found: Sequence[object]) -> int:
    return sum(map(bool, found))
