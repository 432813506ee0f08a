"""What libraries raise on damaged files, as one line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effvit.errors import UserError


@contextmanager
def reading(path: Path, what: str = "damaged file") -> Iterator[None]:
    """Turn any error of a library that reads ``path`` into `UserError`: the path, ``what``, the reason in one line.

    Readers raise nearly anything on damaged files, from `KeyError` to `RecursionError`. Only what is not the file's
    fault stays as it is, see `raise_systems`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise_systems(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: {what} ({reason}); fetch or make it again") from error


def raise_systems(error: Exception) -> None:
    """Raise what is not the file's fault: a file that cannot be opened, or memory that does not suffice."""
    ours = (None, errno.EINVAL)  # what a library found wrong, or a place in the file that cannot be
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in ours):
        raise error
