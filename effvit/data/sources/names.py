"""What the names of files, columns and classes say."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from effvit.errors import UserError

TRAIN, VALIDATION, TEST, WHOLE = "train", "validation", "test", "whole"
_PART = re.compile(r"(?<![A-Za-z])(?:(?i:(train(?:ing)?)|(val(?:id(?:ation)?)?)|(test(?:ing)?)))(?![a-z])")
_SHARD = re.compile(r"(\d+)-of-(\d+)[^/]*$")
_NUMBER = re.compile(r"-?[0-9]{1,19}")
_NO_LABEL = frozenset((None, "", -1, "-1"))
_SIGNS = frozenset((-1, 1, "-1", "1"))


def part_of(name: str) -> str | None:
    """Which part the name of a file or folder says: ``train-00000-of-00002.parquet``, ``valid``, ``testing``."""
    match = _PART.search(name)
    if match is None:
        return None
    return (TRAIN, VALIDATION, TEST)[match.lastindex - 1] if match.lastindex else None


def check_shards(files: Iterable[str], root: Path) -> None:
    """Raise `UserError` where one is missing of files that are numbered as ``train-00000-of-00003.parquet``.

    Numbers begin with 0 or 1. What follows them, such as a hash, may differ.
    """
    found: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _SHARD.search(file):
            kind = (file[: match.start()], match[2], Path(file).suffix)
            found.setdefault(kind, set()).add(int(match[1]))
    for (before, total, suffix), numbers in found.items():
        first = 0 if 0 in numbers or int(total) not in numbers else 1
        missing = next((number for number in range(first, first + int(total)) if number not in numbers), None)
        if missing is not None:
            name = f"{before}{missing:0{len(total)}}-of-{total}{suffix}"
            raise UserError(
                f"{root / name}: is missing, and {len(numbers)} of its {int(total)} parts are there; fetch it"
            )


def find_column(wanted: str, columns: Sequence[str]) -> int | None:
    """The index of the column of that name; else of the only one that differs in case and outer spaces at most."""
    if wanted in columns:
        return columns.index(wanted)
    alike = [index for index, name in enumerate(columns) if name.strip().lower() == wanted.strip().lower()]
    return alike[0] if len(alike) == 1 else None


def has_no_labels(part: str, labels: Collection[object]) -> bool:
    """Whether a part is one to predict: it is no training part, and all its ``labels`` are missing, empty or -1."""
    return part in (TEST, VALIDATION) and _NO_LABEL.issuperset(labels)


def classes_among(labels: Iterable[object]) -> set[object]:
    """Those ``labels`` that are classes: neither missing nor empty, nor -1, unless all classes are -1 and 1."""
    found = set(labels) - {None, ""}
    return found if found <= _SIGNS else found - _NO_LABEL


def number_in(text: str) -> int | None:
    """The whole number that a text is, in ASCII digits; None where it is none."""
    return int(text) if _NUMBER.fullmatch(text) else None


def class_order(name: str) -> tuple[bool, int, str]:
    """What sorts classes: names first, then numbers by their value."""
    number = number_in(name)
    return number is not None, number or 0, name


def show(names: Sequence[str], titles: Mapping[str, str]) -> tuple[str, ...]:
    """Classes by their titles: the first of several synonyms, with the name where two share it or there is none."""
    first = [titles.get(name, "").split(",")[0].strip() or name for name in names]
    counts = Counter(first)
    return tuple(title if counts[title] == 1 else f"{title} ({name})" for name, title in zip(names, first, strict=True))


def other_form(name: str, names: Iterable[str]) -> str:
    """What to say where ``name`` is there in another Unicode form, which looks the same; nothing where it is not."""
    for other in names:
        if other != name and _composed(other) == _composed(name):
            return f": one is in the Unicode form {_form(name)}, the other in {_form(other)}; rename one of them"
    return ""


def check_forms(names: Sequence[str], root: Path) -> None:
    """Raise `UserError` where two names of classes differ in nothing but their Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(_composed(name), name)
        if twin != name:
            raise UserError(f"{root}: class {name!r} is there twice{other_form(name, [twin])}")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _form(name: str) -> str:
    return next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)), "neither NFC nor NFD")
