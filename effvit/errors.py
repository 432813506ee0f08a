"""Errors that a user can mend, reported in one line."""

import errno
import functools
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


# Packages by the module that is imported, where the names differ.
_PACKAGES = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
}
_TYPE = re.compile(r"(constrained-\w+|tuple|list|dict|set|function-\w+|lax-or-strict)(\[.*\])?|int|float|str|bool|none")
_MOST_SHOWN = 80  # characters of a wrong value
_OUT_OF_MEMORY = "out of memory; a smaller model, image or batch takes less"


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right, in one line."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean linformer?)"`` where one of the known names is close to ``name``, else nothing."""
    close = get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def explain(error: "ValidationError", prefix: str = "", model: "type[BaseModel] | None" = None) -> str:
    """One line for a pydantic error: ``prefix.key=value: what is wrong``, keys as one writes them after ``-S``.

    With ``model``, the class that was validated, an unknown key is answered with the valid ones.
    """
    parts = []
    for e in _of_one_choice(error.errors()):
        key = ".".join(str(p) for p in (*filter(None, [prefix]), *e["loc"]))
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            parts.append(f"{key}: unknown option{_instead_of(e['loc'], model)}")
        elif e["type"] == "missing":
            parts.append(f"{key}: missing")
        elif isinstance(e["input"], dict) or not e["loc"]:  # a rule over several keys, which names them itself, or all
            parts.append(f"{key}: {message}" if key else message)
        else:
            parts.append(f"{key}={_shorten(repr(e['input']))}: {message[:1].lower()}{message[1:]}")
    return "; ".join(parts)


def _of_one_choice(errors: list[Any]) -> list[Any]:
    """Of a field that may be of several types, only the errors of the type that the value is of, without its name."""
    fields: dict[Any, list[Any]] = {}
    for e in errors:
        at = next((index for index, part in enumerate(e["loc"]) if index and _TYPE.fullmatch(str(part))), None)
        where = e["loc"] if at is None else e["loc"][:at]
        fields.setdefault((at is None, where), []).append(e if at is None else e | {"loc": where + e["loc"][at + 1 :]})
    chosen = []
    for (plain, _), found in fields.items():
        near = found if plain else [e for e in found if not e["type"].endswith("_type")] or found[:1]
        chosen += near
    return chosen


def _instead_of(loc: tuple[Any, ...], model: "type[BaseModel] | None") -> str:
    """Name the valid keys at the place of an unknown one."""
    known = _keys_at(loc[:-1], model)
    if known is None:
        return ""
    return (
        f", expected one of {', '.join(known)}{did_you_mean(str(loc[-1]), known)}"
        if known
        else ", there are no options"
    )


def _keys_at(loc: tuple[Any, ...], model: Any) -> list[str] | None:
    """Keys that a model takes under ``loc``; None where that is no model."""
    for part in loc:
        fields = getattr(model, "model_fields", None)
        if fields is not None:
            model = fields[part].annotation if part in fields else None
        else:  # a dictionary: any key, values of one type
            model = next(iter(get_args(model)[1:]), None)
    fields = getattr(model, "model_fields", None)
    return None if fields is None else list(fields)


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


@functools.cache
def say_once(line: str) -> None:
    """Print a line to stderr, once a process."""
    print(line, file=sys.stderr)


def print_error(message: str) -> None:
    """Print ``error: message`` as one line on stderr, with escapes for what is no text, as in some file names."""
    line = f"error: {' '.join(message.split())}"
    encoding = sys.stderr.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr and status 1 instead of a traceback, for errors a user can mend.

    SIGTERM ends it as an exception does, so that nothing half-written stays behind. Afterwards Ctrl-C ends it at once.
    """
    try:
        with _ended_by_signals():
            yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None and error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        hint = " (free some space and run again)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        message = f"{where}{error.strerror}{hint}"
    except (MemoryError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        message = cause
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "")
        if extra is None:
            raise
        message = f"needs the package {error.name}: pip install 'effvit[{extra}]'"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print_error(message)
    raise SystemExit(1)


def extra_of(module: str) -> str | None:
    """Name of the extra of this package that brings ``module``; None where it is of none."""
    top = module.partition(".")[0]
    wanted = _PACKAGES.get(top, top).replace("_", "-")
    try:
        requirements = metadata.requires("effvit") or []
    except metadata.PackageNotFoundError:  # run from its source
        return None
    for requirement in requirements:
        package = re.match(r"[\w-]+", requirement)
        extra = re.search(r"extra == [\"'](\w+)[\"']", requirement)
        if package and extra and package[0].lower().replace("_", "-") == wanted:
            return extra[1]
    return None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if main and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            # What libraries still do while the interpreter exits would report it in tracebacks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _cause(error: BaseException) -> str | None:
    """The message for errors that are no bug; None for others."""
    if "torch" not in sys.modules:  # which has hardly a class for its own
        return _OUT_OF_MEMORY if isinstance(error, MemoryError) else None
    from torch import distributed

    from effvit.memory import is_out_of_memory

    text = str(error)
    if is_out_of_memory(error):
        return _OUT_OF_MEMORY
    if text.startswith("DataLoader worker (pid"):
        return "a worker that decodes images was killed, perhaps for want of memory; fewer workers take less"
    if "gloo" in text and "by peer" in text:
        return "another process of this training has ended; its own message says why"
    if distributed.is_available() and isinstance(error, distributed.DistError):
        cause = (text.strip() or type(error).__name__).splitlines()[-1]
        return f"the processes of this training cannot work together ({cause})"
    return None
