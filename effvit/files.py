"""Results appear whole or not at all: all is written aside and renamed into place, with directories synced to disk."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effvit.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Known = tuple[str, ...] | Callable[[Path], bool]
"""What tells earlier results: patterns that all their names fit, the first one's file among them; or a function."""


@contextmanager
def staged_dir(final: Path, known_by: Known | None = None) -> Iterator[Path]:
    """Yield an empty directory next to ``final`` that replaces it on success and vanishes on any failure.

    Raises:
        UserError: ``final`` must not be replaced, see `check_replaceable`.
    """
    check_replaceable(final, known_by)
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    aside.chmod(0o777 & ~_umask())  # mkdtemp makes it private to the owner
    try:
        yield aside
        _sync_tree(aside)
        replace_dir(aside, final)
        sync_directory(final.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        name_file(error, final, aside)
        raise


def check_replaceable(final: Path, known_by: Known | None = None) -> None:
    """Make the directory that shall hold ``final``, and fail where ``final`` could not be replaced in it.

    Args:
        final: directory to write.
        known_by: what tells earlier results: any other directory is somebody else's, and is kept. Without it anything
            is replaced.

    Raises:
        UserError: ``final`` is or holds the current directory, is a link, or has something else than earlier results.
        PermissionError: the directory that shall hold it cannot be written to.
    """
    if known_by and final.is_symlink():
        raise UserError(f"{final}: is a link, and a directory would take its place; name what it points to")
    if known_by and final.exists() and (not final.is_dir() or any(final.iterdir())):
        why = _why_unknown(final, known_by)
        if why is not None:
            raise UserError(f"{final}: holds something else{why}; expected a new or an empty directory")
    if Path.cwd().is_relative_to(final.resolve()):
        raise UserError(f"{final}: is replaced as a whole, and with it the current directory; name another")
    missing = [parent for parent in final.parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        sync_directory(directory.parent)
    if not os.access(final.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(final))


def _why_unknown(final: Path, known_by: Known) -> str | None:
    """None where earlier results are in ``final`` and nothing else, or the reason why not, in brackets."""
    if callable(known_by):
        return None if known_by(final) else ""
    if not (final / known_by[0]).is_file():
        return f" (no {known_by[0]})"
    for path in sorted(final.iterdir()):
        if path.is_dir() or not any(fnmatchcase(path.name, pattern) for pattern in known_by):
            return f" ({path.name})"
    return None


def check_apart(output_dir: Path, *inputs: Path) -> None:
    """Raise ``UserError`` where replacing ``output_dir`` as a whole would remove one of ``inputs``."""
    for path in inputs:
        if path.resolve().is_relative_to(output_dir.resolve()):
            raise UserError(f"{output_dir}: is replaced as a whole, and {path} with it; name another output")


def replace_dir(aside: Path, final: Path) -> None:
    """Put the directory ``aside`` in the place of ``final``, whatever is there.

    What was there is renamed before it is removed: a kill leaves one of the two whole, or neither in that place.
    """
    old = final.with_name(f".{final.name}.replaced")
    if old.is_dir():  # of a run that was killed
        shutil.rmtree(old)
    if final.is_symlink() or final.is_file():
        final.unlink()
    elif final.exists():
        final.replace(old)
    aside.replace(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Yield a path next to ``final``, with its suffix, that replaces it on success and vanishes on any failure."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{os.getpid()}.tmp.{final.name}")
    try:
        yield aside
        aside.replace(final)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        name_file(error, final, aside)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, keys in the order given."""
    with staged_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, frame: "pd.DataFrame") -> None:
    """Write ``frame`` without its index; floats in the shortest form that reads back the same."""
    with staged_file(path) as aside:
        frame.to_csv(aside, index=False, lineterminator="\n")


def name_file(error: BaseException, final: Path, aside: Path | None = None) -> None:
    """Tell ``final`` as the file of an error that has none, as a write to an open file, or the one written aside."""
    unnamed = (None, str(aside)) if aside else (None,)
    if isinstance(error, OSError) and error.errno is not None and error.filename in unnamed:
        error.filename, error.filename2 = str(final), None


def sync_directory(directory: Path) -> None:
    """Make what was made or renamed in the directory outlive a loss of power, where the system can."""
    if os.name == "posix":
        try:
            _sync(directory)
        except OSError as error:  # a directory that may not be read, a file system without
            if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
                raise


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        elif os.name == "posix":
            _sync(path)
    sync_directory(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
