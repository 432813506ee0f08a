"""Errors that a user can mend, told in one line."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right, in one line."""


def explain(error: "ValidationError", prefix: str = "") -> str:
    """One line for a pydantic error: ``prefix.key=value: what is wrong``, keys as one writes them after ``-S``."""
    parts = []
    for e in error.errors():
        key = ".".join(str(p) for p in (*filter(None, [prefix]), *e["loc"]))
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            parts.append(f"{key}: unknown option")
        elif e["type"] == "missing":
            parts.append(f"{key}: missing")
        elif isinstance(e["input"], dict):  # a rule over several keys, which names them itself
            parts.append(f"{key}: {message}" if key else message)
        else:
            parts.append(f"{key}={e['input']!r}: {message[:1].lower()}{message[1:]}")
    return "; ".join(parts)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr and status 1 instead of a traceback, for errors a user can mend."""
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None and error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        hint = " (free some space and run again)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        message = f"{where}{error.strerror}{hint}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(1)
