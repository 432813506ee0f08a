"""Prepared data sets by Python."""

import os
from pathlib import Path

from effvit.data.loading.prepared import PreparedDataset
from effvit.data.preparing import prepare

PathLike = str | os.PathLike[str]


def prepare_data(
    name: str,
    directory: PathLike,
    *,
    image_size: int = 32,
    root: PathLike | None = None,
    classes: PathLike | None = None,
    workers: int = 1,
    test_share: float | None = None,
    label_level: int = 1,
    image_column: str | None = None,
    label_column: str | None = None,
) -> PreparedDataset:
    """Write a data set with splits and normalisation to ``directory``, downloading it where needed, and open it.

    Args:
        name: digits, cifar10, cifar100, imagenet100 or folder.
        directory: absent, empty or an earlier prepared data set, which is replaced; `open_data` opens it another time.
        image_size: height and width of the prepared images in pixels.
        root: directory, archive or file with the originals; by default ``$EFFVIT_DATA/name``, or the user's cache.
        classes: a file with the classes to take, one a line, of imagenet100 or folder.
        workers: processes that read image files; more than one only in a script with ``if __name__ == "__main__"``.
        test_share: what share of each class becomes the test split, for images without one.
        label_level: the level of folders that are the classes, 1 for the top.
        image_column: column of a CSV or a Parquet file that has the images, where its name does not say so.
        label_column: column that has the classes.

    Raises:
        UserError: a wrong argument, or files that are missing, damaged or not what the source expects.
    """
    original = None if root is None else Path(root)
    chosen = None if classes is None else Path(classes)
    return prepare(
        name,
        original,
        image_size,
        Path(directory).expanduser(),
        classes=chosen,
        workers=workers,
        test_share=test_share,
        label_level=label_level,
        image_column=image_column,
        label_column=label_column,
    )


def open_data(directory: PathLike) -> PreparedDataset:
    """Open what `prepare_data` or ``effvit prepare`` wrote; raises ``UserError`` where it is not whole and sound."""
    return PreparedDataset.load(Path(directory).expanduser())
