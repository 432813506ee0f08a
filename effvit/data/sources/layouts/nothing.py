"""What to say where no images were recognised: what was found instead, and what to type."""

from pathlib import Path

from effvit.data.sources.images import SUFFIXES
from effvit.data.sources.layouts.class_folders import find_parts, has_image
from effvit.data.sources.tree import Directory, Tree
from effvit.errors import did_you_mean

_COMPRESSED = {
    ".gz": "tar -xf",
    ".tgz": "tar -xf",
    ".xz": "tar -xf",
    ".txz": "tar -xf",
    ".bz2": "tar -xf",
    ".tbz2": "tar -xf",
    ".zst": "tar -xf",
    ".7z": "7z x",
    ".rar": "unrar x",
}
_ARCHIVES = (".zip", ".tar", *_COMPRESSED)
_TABLES = (".parquet", ".pq", ".arrow", ".npz", ".csv")
_NAMED = 3
_EXPECTED = "expected train/<class>/ and test/<class>/ or val/<class>/ with images, or another layout of docs/data.md"


def explain_missing(root: Path) -> str:
    """For a root that is not there."""
    parent = root.parent
    siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(root.name, siblings)
    missing = "" if parent.is_dir() else f"; {_first_missing(root)} is not there either"
    return f"root={root}: no such folder or file{hint}{missing}"


def _first_missing(root: Path) -> Path:
    return next(parent for parent in reversed(root.parents) if not parent.exists())


def explain_file(root: Path) -> str:
    """For a root that is a file of a kind that is not read."""
    command = _COMPRESSED.get(root.suffix.lower())
    if command:
        return (
            f"root={root}: a compressed archive, which cannot be read in place; unpack it ({command} {root.name}) and "
            "name the folder as root"
        )
    return f"root={root}: a file; expected a folder, or a .zip, .tar, .npz, .parquet or .arrow file"


def explain(root: Path, top: Tree, tree: Tree) -> str:
    """For ``root`` as tree ``top``, where no layout was recognised; ``tree`` is the innermost folder looked at."""
    inside = "" if tree is top else f"{tree.root.name}/ in it: "
    return f"root={root}: {inside}{_explain(tree)}"


def _explain(tree: Tree) -> str:
    entries, folders, files = tree.entries(), tree.folders(), tree.files()
    if not entries:
        return f"is empty; {_EXPECTED}"
    if archives := [name for name in files if name.lower().endswith(_ARCHIVES)]:
        return _about_archives(tree, archives)
    parts = find_parts(tree)
    if parts:
        return _about_parts(tree, {part: names[0] for part, names in parts.items()}, folders)
    if inside := [folder for folder in folders if find_parts(tree.within(folder))]:
        return (
            f"no train/ here, but in {_list([f'{name}/' for name in inside])}; name one as root, as "
            f"root={tree.root / inside[0]}"
        )
    if images := [name for name in files if Path(name).suffix.lower() in SUFFIXES]:
        return (
            f"{len(images):,} images without labels; sort them into folders of classes, or add a CSV with the columns "
            "image and label"
        )
    if packed := [name for name in files if not isinstance(tree, Directory) and name.lower().endswith(_TABLES)]:
        return f"{packed[0]} in an archive is not read in place; unpack it and name the folder as root"
    if len(folders) == 1 and any(Path(name).suffix.lower() in SUFFIXES for name in tree.files(folders[0])):
        return f"one folder of images, {folders[0]}/, and no labels; expected a folder for each class, or a CSV"
    return f"found {_list([*(f'{name}/' for name in folders), *files])}; {_EXPECTED}"


def _about_archives(tree: Tree, archives: list[str]) -> str:
    readable = [name for name in archives if name.lower().endswith((".zip", ".tar"))]
    if len(archives) == 1 and readable and isinstance(tree, Directory):
        return f"holds the archive {archives[0]}; name it as root, as root={tree.root / archives[0]}"
    if not isinstance(tree, Directory):
        return f"holds {_list(archives)}, and archives in an archive are not read in place; unpack both"
    commands = {Path(name).suffix.lower(): name for name in archives}
    shown = [f"{'unzip' if end == '.zip' else _COMPRESSED.get(end, 'tar -xf')} {commands[end]}" for end in commands]
    return f"holds {len(archives)} archives, {_list(archives)}; unpack them there ({', '.join(shown)}) and run again"


def _about_parts(tree: Tree, parts: dict[str, str], folders: list[str]) -> str:
    names = " and ".join(f"{name}/" for name in parts.values())
    if "train" not in parts:
        others = [name for name in folders if name not in parts.values()]
        hint = next((f" (is {name}/ meant?)" for name in others if did_you_mean(name, ["train"])), "")
        return f"found {names} and no train/{hint}; {_EXPECTED}"
    train = parts["train"]
    if images := [f"{name}/" for name in folders if name not in parts.values() and has_image(tree, name)]:
        return (
            f"{train}/ has no folders of classes, and {_list(images)} have images; if {train} is a class like these, "
            "give it another name, as this one is that of the training part"
        )
    return (
        f"{train}/ has {len(tree.files(train)):,} files and no folders of classes; sort them into {train}/<class>/, or "
        "add a CSV with the columns image and label"
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
