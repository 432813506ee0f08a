"""ImageNet-100: a hundred classes of ImageNet-1k, in the three layouts that are about."""

from codecs import BOM_UTF8
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from effvit.data.sources.base import Source, default_root
from effvit.data.sources.folder import build_source, read_class_list
from effvit.errors import UserError

_NUM_CLASSES = 100
_LABELS = "Labels.json"


def imagenet100(root: Path | None, image_size: int, classes: Path | None = None) -> Source:
    """ImageNet-100 in ``root``, by default `default_root`; the official validation part is the test split.

    The layout is recognised by its content:

    - ``train.X1``, ``train.X2`` ... and ``val.X``, each with folders of classes: the release on Kaggle;
    - ``train/<wnid>`` and ``val/<wnid>``: all classes if there are at most a hundred; of more, as in ImageNet-1k, those
      of Tian et al. 2020 (Contrastive Multiview Coding, arXiv 1906.05849).

    ``classes`` is a file with the WNIDs to take instead, one a line. Classes are in the order of their WNIDs; a file
    ``Labels.json``, WNID to name, gives the names that are shown.

    Raises:
        UserError: none of these layouts, a class that is missing, a wrong file of classes or names.
    """
    root = root or default_root("imagenet100")
    train, test, description = _find_layout(root)
    wanted = read_class_list(classes) if classes else None
    there = {path.name for name in train for path in (root / name).glob("n*") if path.is_dir()}
    if wanted is None and len(there) > _NUM_CLASSES:
        wanted = standard_wnids()
        if missing := [wnid for wnid in wanted if wnid not in there]:
            raise UserError(
                f"{root}: has {len(there)} classes, of which the usual hundred are taken, but {missing[0]} is not "
                "there; name a file with those to take as classes"
            )
    if wanted is not None:
        description += f", {len(wanted)} classes from a list"
    source = build_source(description, root, train, test, wanted)
    return replace(source, classes=_display_names(root / _LABELS, source.classes))


def standard_wnids() -> tuple[str, ...]:
    """The hundred WNIDs of Tian et al. 2020."""
    return tuple((files("effvit.data.sources") / "imagenet100.txt").read_text(encoding="utf-8").split())


def _find_layout(root: Path) -> tuple[list[str], list[str], str]:
    parts = sorted(path.name for path in root.glob("train.X*") if path.is_dir())
    if parts and (root / "val.X").is_dir():
        return parts, ["val.X"], "ImageNet-100, Kaggle release train.X*, val.X"
    if (root / "train").is_dir() and (root / "val").is_dir():
        return ["train"], ["val"], "ImageNet tree train/<wnid>, val/<wnid>"
    raise UserError(
        f"{root}: expected train/<wnid>/ and val/<wnid>/, or train.X1/<wnid>/ ... and val.X/<wnid>/; put ImageNet-100 "
        "or ImageNet-1k there, or name its place as root"
    )


def _display_names(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first of a class's synonyms, with the WNID where it has none or shares it with another class."""
    if not path.is_file():
        return wnids
    try:
        labels = TypeAdapter(dict[str, str]).validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except ValidationError as error:
        raise UserError(f"{path}: expected a JSON object of WNIDs and names") from error
    first = [labels.get(wnid, "").split(",")[0].strip() or wnid for wnid in wnids]
    counts = Counter(first)
    return tuple(name if counts[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(first, wnids, strict=True))
