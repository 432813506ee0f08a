"""Data sets: one file a source, one prepared format, and the registry that joins them.

A source is a function ``name(root, image_size) -> Source`` (see `effvit.data.source`) in the module named here; adding
one takes a file and a line of ``_SOURCES``. Those of ``_CHOOSE_CLASSES`` also take a file of the classes wanted.
"""

from importlib import import_module
from pathlib import Path

from effvit.data.prepared import FILES, PreparedDataset
from effvit.errors import UserError
from effvit.files import check_apart, check_replaceable

__all__ = ["PreparedDataset", "available_datasets", "prepare"]

_SOURCES = {
    "digits": "effvit.data.digits",
    "cifar10": "effvit.data.cifar",
    "cifar100": "effvit.data.cifar",
    "imagenet100": "effvit.data.imagenet100",
    "folder": "effvit.data.folder",
}
_CHOOSE_CLASSES = ("imagenet100", "folder")
_SIZES = range(8, 1025)


def available_datasets() -> tuple[str, ...]:
    """Names that `prepare` knows."""
    return tuple(_SOURCES)


def prepare(
    name: str,
    root: Path | None,
    image_size: int,
    output_dir: Path,
    *,
    classes: Path | None = None,
    num_classes: int | None = None,
    workers: int = 1,
) -> PreparedDataset:
    """Write data set ``name`` to ``output_dir`` in the prepared format and open it.

    Args:
        name: one of `available_datasets`.
        root: directory of the original files; None for the default of the source.
        image_size: height and width of the prepared images in pixels.
        output_dir: replaced as a whole; must be absent, empty, or a prepared data set, and hold none of the originals.
        classes: a file with the classes to take, one a line; all by default.
        num_classes: how many classes are expected; None for any number.
        workers: processes that read image files; more than one needs a ``__main__`` that can be imported.

    Raises:
        UserError: a wrong argument, or files that are missing, damaged or not what the source expects.
    """
    if name not in _SOURCES:
        raise UserError(f"--dataset {name}: unknown data set; expected one of {', '.join(_SOURCES)}")
    if image_size not in _SIZES:
        raise UserError(f"--image-size {image_size}: expected {_SIZES.start} to {_SIZES[-1]} pixels")
    if classes and name not in _CHOOSE_CLASSES:
        raise UserError(f"--classes {classes}: {name} has its own; only {' and '.join(_CHOOSE_CLASSES)} take a choice")
    from effvit.data.source import default_root
    from effvit.data.writer import write_prepared

    root, classes = root and root.expanduser(), classes and classes.expanduser()
    if name != "digits":  # which are in a package
        check_apart(output_dir, root or default_root(name), *filter(None, [classes]))
    check_replaceable(output_dir, FILES)
    choice = {"classes": classes} if classes else {}
    source = getattr(import_module(_SOURCES[name]), name)(root, image_size, **choice)
    if num_classes not in (None, len(source.classes)):
        raise UserError(f"num_classes={num_classes}: {name} has {len(source.classes)} classes there; set it to that")
    write_prepared(source, name, image_size, output_dir, workers)
    return PreparedDataset.load(output_dir)
