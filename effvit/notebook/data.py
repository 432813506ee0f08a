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
) -> PreparedDataset:
    """Write a data set with splits and normalisation to ``directory``, downloading it where needed, and open it.

    Args:
        name: digits, cifar10, cifar100, imagenet100 or folder.
        directory: absent, empty or an earlier prepared data set, which is replaced; `open_data` opens it another time.
        image_size: height and width of the prepared images in pixels.
        root: directory of the original files; by default ``$EFFVIT_DATA/name``, or the user's cache.
        classes: a file with the classes to take, one a line, of imagenet100 or folder.
        workers: processes that read image files; more than one only in a script with ``if __name__ == "__main__"``.

    Raises:
        UserError: a wrong argument, or files that are missing, damaged or not what the source expects.
    """
    original = None if root is None else Path(root)
    chosen = None if classes is None else Path(classes)
    return prepare(name, original, image_size, Path(directory).expanduser(), classes=chosen, workers=workers)


def open_data(directory: PathLike) -> PreparedDataset:
    """Open what `prepare_data` or ``effvit prepare`` wrote; raises ``UserError`` where it is not whole and sound."""
    return PreparedDataset.load(Path(directory).expanduser())
