"""What was recognised at a root, and how its parts become the splits of a source."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from effvit.data.sources.base import Originals, Source, Split
from effvit.data.sources.holdout import hold_out
from effvit.data.sources.joined import join_originals
from effvit.data.sources.names import TEST, TRAIN, VALIDATION, WHOLE, check_forms, other_form, show
from effvit.data.sources.tree import Tree
from effvit.errors import UserError, did_you_mean

_LARGEST_SHARE = 0.5
_FOR_SOME = ("label_level", "image_column", "label_column")  # choices that not every layout takes


@dataclass(frozen=True)
class Choices:
    """What a user says of their files, where content does not.

    ``classes`` is a file with the classes to take, one a line. ``test_share`` of each class becomes the test split
    where there is none. ``label_level`` is the level of folders that are the classes, 1 for the top. ``image_column``
    and ``label_column`` name columns of a table.
    """

    classes: Path | None = None
    test_share: float | None = None
    label_level: int = 1
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        if self.test_share is not None and not 0 < self.test_share <= _LARGEST_SHARE:
            raise UserError(f"test_share={self.test_share}: expected more than 0, up to {_LARGEST_SHARE}")
        if self.label_level < 1:
            raise UserError(f"label_level={self.label_level}: expected 1 for the top folders, or more")


BY_CONTENT = Choices()
"""Nothing is said."""


@dataclass(frozen=True)
class Layout:
    """Images in a form that was recognised.

    ``read`` takes the classes wanted, some of ``classes`` in their order, and returns the parts that are there: train,
    validation, test, or the whole where there is no split. Labels are indices into the classes wanted. ``titles`` are
    what classes are called where their names are codes. ``takes`` are the choices that matter to it, among label_level,
    image_column and label_column. ``tree`` is where it was recognised.
    """

    description: str
    classes: tuple[str, ...]
    read: Callable[[tuple[str, ...]], dict[str, Split]]
    titles: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    tree: Tree | None = None


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names in a text file, one a line; raises `UserError` where there is none or one twice."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file with one class a line") from error
    names = tuple(filter(None, map(str.strip, lines)))
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{path}: class {name!r} is named {count} times")
    if not names:
        raise UserError(f"{path}: expected one class a line, found none")
    return names


def build_source(layout: Layout, root: Path, choices: Choices, wanted: Sequence[str] | None = None) -> Source:
    """The source of a layout found at ``root``, with the classes ``wanted`` or all, in the layout's order.

    The test split is the test part; where there is none, the validation part; where there is neither, the share
    ``test_share`` of each class by `hold_out`. A validation part next to a test part is the validation split.

    Raises:
        UserError: a choice that does nothing there; a class that is wanted is not there, or is there in two Unicode
            forms; fewer than two classes; no training part, or no test part and no share; a share where there is a test
            part.
    """
    _check_choices(layout, choices)
    check_forms(layout.classes, root)
    if not wanted:
        chosen = layout.classes
    else:
        for name in wanted:
            if name not in layout.classes:
                hint = other_form(name, layout.classes) or did_you_mean(name, layout.classes)
                raise UserError(f"class {name!r} is wanted, but {root} has none of that name{hint}")
        chosen = tuple(name for name in layout.classes if name in set(wanted))
    if len(chosen) < 2:
        raise UserError(f"{root}: expected at least 2 classes, found {len(chosen)}{_named(chosen)}")
    parts = layout.read(chosen)
    description = layout.description
    if choices.test_share is not None:
        if TEST in parts or VALIDATION in parts:
            raise UserError(
                f"test_share={choices.test_share}: {root} has a test split already ({description}); leave it out"
            )
        whole = parts.get(WHOLE) or _training(parts, root)
        train, test = _divide(whole, choices.test_share, chosen, root)
        description += f", {choices.test_share:.0%} of each class held out as test split by a fixed rule"
        return Source(description, show(chosen, layout.titles), train, test)
    if WHOLE in parts:
        raise UserError(
            f"root={root}: {len(chosen)} classes with {len(parts[WHOLE].labels):,} images and no split "
            f"({description}); add test_share=0.2 to hold out a fifth of each class as test split"
        )
    train, validation = _training(parts, root), None
    if TEST not in parts and VALIDATION not in parts:
        divided = ", or test_share=0.2 to hold out a fifth of each class as test split"
        raise UserError(
            f"root={root}: found training images and no test or validation part with labels ({description}); add it"
            f"{divided if isinstance(train.images, Originals) else ''}"
        )
    if TEST in parts and VALIDATION in parts:
        start = len(train.labels)
        train = _joined(train, parts[VALIDATION])
        validation = np.arange(start, len(train.labels), dtype=np.int64)
    test = parts[TEST] if TEST in parts else parts[VALIDATION]
    return Source(description, show(chosen, layout.titles), train, test, validation)


def _check_choices(layout: Layout, choices: Choices) -> None:
    for name in _FOR_SOME:
        value = getattr(choices, name)
        if name not in layout.takes and value != getattr(BY_CONTENT, name):
            raise UserError(f"{name}={value}: does nothing for {layout.description}; leave it out")


def _training(parts: Mapping[str, Split], root: Path) -> Split:
    if TRAIN not in parts:
        raise UserError(f"root={root}: found a {' and a '.join(parts)} part, but no train part")
    return parts[TRAIN]


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(map(repr, names))})" if names else ""


def _divide(whole: Split, share: float, classes: Sequence[str], root: Path) -> tuple[Split, Split]:
    if not isinstance(whole.images, Originals):
        raise UserError(f"test_share={share}: {root} holds arrays, which are not divided")
    counts = np.bincount(whole.labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count < 3:
            raise UserError(f"class {name!r} has {count} images, expected at least 3 (for train, validation and test)")
    kept, held = hold_out(whole.labels, every=1 / share)
    for name, count, left in zip(classes, counts, np.bincount(whole.labels[kept]), strict=True):
        if left < 2:
            raise UserError(
                f"test_share={share}: of the {count} images of class {name!r} it leaves {left}, expected at least 2 "
                "(for train and validation); lower it or add images"
            )
    return (
        Split(whole.labels[kept], whole.images.take(kept), whole.notes),
        Split(whole.labels[held], whole.images.take(held)),
    )


def _joined(first: Split, second: Split) -> Split:
    images: Originals | Iterable[np.ndarray]
    if isinstance(first.images, Originals) and isinstance(second.images, Originals):
        images = join_originals([first.images, second.images])
    else:
        images = chain(first.images, second.images)  # type: ignore[arg-type]
    return Split(np.concatenate([first.labels, second.labels]), images, first.notes + second.notes)
