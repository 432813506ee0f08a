"""ImageNet-100: a hundred classes of ImageNet-1k, in any layout that is recognised."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from effvit.data.sources.base import Source, default_root
from effvit.data.sources.layout import BY_CONTENT, Choices, build_source, read_class_list
from effvit.data.sources.layouts.recognise import recognise
from effvit.data.sources.tree import Tree
from effvit.errors import UserError

_NUM_CLASSES = 100
_LABELS = "Labels.json"


def imagenet100(root: Path | None, image_size: int, choices: Choices = BY_CONTENT) -> Source:
    """ImageNet-100 in ``root``, by default `default_root`; the official validation part is the test split.

    All classes are taken if there are at most a hundred; of more, as in ImageNet-1k, those of Tian et al. 2020
    (Contrastive Multiview Coding, arXiv 1906.05849), or those in the file ``choices.classes``. A file ``Labels.json``,
    WNID to name, gives the names that are shown.

    Raises:
        UserError: no layout was recognised, a class is missing, a file of classes or names is wrong.
    """
    root = root or default_root("imagenet100")
    layout = recognise(root, choices, image_size)
    wanted = read_class_list(choices.classes) if choices.classes else None
    if wanted is None and len(layout.classes) > _NUM_CLASSES:
        wanted = _the_usual(layout.classes, root)
    if wanted is not None:
        layout = replace(layout, description=f"{layout.description}, {len(wanted)} classes from a list")
    if layout.tree and layout.tree.has(_LABELS):
        layout = replace(layout, titles=_read_titles(layout.tree))
    return build_source(layout, root, choices, wanted)


def standard_wnids() -> tuple[str, ...]:
    """The hundred WNIDs of Tian et al. 2020."""
    return tuple((files("effvit.data.sources") / "imagenet100.txt").read_text(encoding="utf-8").split())


def _the_usual(classes: Sequence[str], root: Path) -> tuple[str, ...]:
    wanted = standard_wnids()
    if missing := [wnid for wnid in wanted if wnid not in classes]:
        raise UserError(
            f"{root}: has {len(classes)} classes, of which the usual hundred are taken, but {missing[0]} is not "
            "there; name a file with those to take as classes"
        )
    return wanted


def _read_titles(tree: Tree) -> dict[str, str]:
    try:
        return TypeAdapter(dict[str, str]).validate_json(tree.read_text(_LABELS))
    except ValidationError as error:
        raise UserError(f"{tree.root / _LABELS}: expected a JSON object of WNIDs and names") from error
