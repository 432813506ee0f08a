"""Where a prepared data set is made: next to its final place, found again after a kill, gone on success."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from effvit.data.loading.prepared import DAMAGED_FILE, FILES
from effvit.errors import UserError
from effvit.files import check_replaceable, name_file, replace_dir


def _is_workspace(directory: Path) -> bool:
    return directory.is_dir() and {path.name for path in directory.iterdir()} <= {"data", "done", "lock", DAMAGED_FILE}


@contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """Yield a directory with ``data``, which replaces ``final`` on success, and ``done``, for records of what is whole.

    An error removes it, unless there is a record and the error was not the system's (a full disk is not left full). The
    list of damaged images is kept there as well.

    Raises:
        UserError: another process works there, or ``final`` must not be replaced.
    """
    check_replaceable(final, FILES)
    work = final.with_name(f".{final.name}.partial")
    check_replaceable(work, _is_workspace)
    for name in ("data", "done"):
        (work / name).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            try:
                yield work
                shutil.rmtree(work / "done")
                replace_dir(work / "data", final)
                shutil.rmtree(work)
            except BaseException as error:
                if isinstance(error, OSError) or not any((work / "done").glob("[!.]*.json")):
                    shutil.rmtree(work, ignore_errors=True)
                elif not isinstance(error, Exception):
                    print("stopped: the same command resumes", file=sys.stderr)
                name_file(error, final)
                raise
    except Timeout as error:
        raise UserError(f"{final}: another `effvit prepare` is writing it; wait for it to end") from error
