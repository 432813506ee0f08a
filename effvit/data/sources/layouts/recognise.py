"""Which form the images at a root have."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from effvit.data.sources.layout import Choices, Layout
from effvit.data.sources.layouts.arrays import arrays
from effvit.data.sources.layouts.class_folders import find_parts, has_class_folders, split_folders, whole_folders
from effvit.data.sources.layouts.csv_table import csv_table
from effvit.data.sources.layouts.imagenet import imagenet
from effvit.data.sources.layouts.nothing import explain, explain_file, explain_missing
from effvit.data.sources.layouts.tables import tables
from effvit.data.sources.layouts.tiny_imagenet import tiny_imagenet
from effvit.data.sources.layouts.webdataset import is_shard, webdataset
from effvit.data.sources.packed import open_tar, open_zip
from effvit.data.sources.tree import Directory, Tree
from effvit.errors import UserError

Recogniser = Callable[[Tree, Choices], Layout | str | None]
"""Returns a layout, or a text: why something that looks like one is none."""

_FOLDERS: tuple[Recogniser, ...] = (tiny_imagenet, imagenet, split_folders)
_SINGLE = (".npz", ".parquet", ".pq", ".arrow")
_DEEPEST = 16


def recognise(root: Path, choices: Choices, image_size: int) -> Layout:
    """The layout of what is at ``root``, a folder or a file.

    The order is: files that hold images (arrays, tables, tar shards); Tiny-ImageNet; ImageNet; folders of classes; a
    CSV; folders of classes without a split; the same in the only folder there. A CSV comes first where columns are
    named.

    Raises:
        UserError: none of them, or two at once; what was found is named, and what to do.
    """
    top = tree = open_root(root)
    why = None
    for _ in range(_DEEPEST):
        found = _recognise(tree, choices, image_size)
        if isinstance(found, Layout):
            return found
        why = found or why
        folders = tree.folders()
        if len(folders) != 1 or tree.files() or find_parts(tree):
            raise UserError(f"root={root}: {why}" if why else explain(root, top, tree))
        tree = tree.within(folders[0])
    raise UserError(f"{tree.root}: folders in folders {_DEEPEST} levels deep; does a link lead back?")


def open_root(root: Path) -> Tree:
    """The tree at a root: a directory, a zip or tar archive, or the directory that has a file as if it were alone."""
    if root.is_dir():
        return Directory(root)
    if not root.exists():
        raise UserError(explain_missing(root))
    suffix = root.suffix.lower()
    if suffix in _SINGLE:
        return Directory(root.parent, only=root.name)
    if suffix == ".zip":
        return open_zip(root)
    if suffix == ".tar":
        return Directory(root.parent, only=root.name) if is_shard(root) else open_tar(root)
    raise UserError(explain_file(root))


def _recognise(tree: Tree, choices: Choices, image_size: int) -> Layout | str | None:
    """The layout, or why there is none: what the last that comes close says, and what `whole_folders` does."""
    holding: tuple[Recogniser, ...] = (partial(arrays, image_size=image_size), tables, webdataset)
    by_columns = choices.image_column or choices.label_column
    ordered = (csv_table, *_FOLDERS) if by_columns else (*_FOLDERS, csv_table)
    why = None
    for recogniser in (*holding, *ordered, whole_folders):
        found = recogniser(tree, choices)
        if isinstance(found, Layout):
            if recogniser in holding and has_class_folders(tree):
                raise UserError(
                    f"root={tree.root}: holds two data sets, {found.description} and folders of classes; "
                    "move one elsewhere"
                )
            return replace(found, tree=tree)
        why = "; ".join(filter(None, (why, found))) if recogniser is whole_folders else found or why
    return why
