"""From a source's images to the prepared format, which training reads."""

from pathlib import Path

from effvit.data.loading.prepared import FILES, PreparedDataset
from effvit.data.sources import check_name, open_source
from effvit.data.sources.layout import Choices
from effvit.errors import UserError
from effvit.files import check_apart, check_replaceable

_SIZES = range(8, 1025)


def prepare(
    name: str,
    root: Path | None,
    image_size: int,
    output_dir: Path,
    *,
    classes: Path | None = None,
    num_classes: int | None = None,
    workers: int = 1,
    skip_damaged: bool = False,
    test_share: float | None = None,
    label_level: int = 1,
    image_column: str | None = None,
    label_column: str | None = None,
) -> PreparedDataset:
    """Write data set ``name`` to ``output_dir`` in the prepared format and open it.

    Args:
        name: one of `effvit.data.sources.available_datasets`.
        root: directory, archive or file with the originals; None for the default of the source.
        image_size: height and width of the prepared images in pixels.
        output_dir: replaced as a whole; must be absent, empty, or a prepared data set, and neither hold the
            originals nor be among them.
        classes: a file with the classes to take, one a line; all by default.
        num_classes: how many classes are expected; None for any number.
        skip_damaged: leave damaged images out, with a count in ``notes`` and a list in ``damaged.csv``.
        workers: processes that read image files; more than one needs a ``__main__`` that can be imported.
        test_share: what share of each class becomes the test split, for images without one.
        label_level: the level of folders that are the classes, 1 for the top.
        image_column: column of a CSV or a Parquet file that has the images, where its name does not say so.
        label_column: column that has the classes.

    Raises:
        UserError: a wrong argument, or files that are missing, damaged or not what the source expects.
    """
    check_name(name, classes)
    if isinstance(image_size, bool | float) or image_size not in _SIZES:
        raise UserError(f"image_size={image_size!r}: expected {_SIZES.start} to {_SIZES[-1]} pixels")
    from effvit.data.preparing.writer import write_prepared
    from effvit.data.sources.base import default_root

    root, classes = root and root.expanduser(), classes and classes.expanduser()
    choices = Choices(classes, test_share, label_level, image_column, label_column)
    if name != "digits":  # which are in a package
        if name == "folder" and root is None and not default_root(name).exists():
            raise UserError("root: missing; expected the folder with train/<class>/ and test/<class>/ or val/<class>/")
        originals = root or default_root(name)
        check_apart(output_dir, originals, *filter(None, [classes]))
        if originals.is_dir() and output_dir.resolve().is_relative_to(originals.resolve()):
            raise UserError(f"{output_dir}: is in root={originals}, and would pass for originals; name another output")
    check_replaceable(output_dir, FILES)
    source = open_source(name, root, image_size, choices)
    if num_classes not in (None, len(source.classes)):
        raise UserError(f"num_classes={num_classes}: {name} has {len(source.classes)} classes there; set it to that")
    write_prepared(source, name, image_size, output_dir, workers, skip_damaged=skip_damaged)
    return PreparedDataset.load(output_dir)
