"""Which images are damaged: all in a file, the first ones in the message."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from effvit.data.loading.prepared import DAMAGED_FILE
from effvit.data.sources.base import Originals
from effvit.errors import UserError

_MOST_NAMED = 20


def report_damaged(work: Path, parts: Sequence[tuple[object, Mapping[int, str]]], skip: bool) -> None:
    """List damaged images in ``damaged.csv``: columns file and reason.

    With ``skip`` the list becomes part of the prepared data set; otherwise it stays in ``work`` until nothing is
    damaged any more. Without damaged images there is no list.

    Args:
        work: the workspace of the preparation.
        parts: for each stored part its images and, by row, what is wrong with those that are damaged.
        skip: whether damaged images are left out.

    Raises:
        UserError: there are damaged images, and they are not to be skipped.
    """
    (work / DAMAGED_FILE).unlink(missing_ok=True)
    rows = [
        (images.root, images.name(row), reason)
        for images, damaged in parts
        if isinstance(images, Originals)
        for row, reason in damaged.items()
    ]
    if not rows:
        return
    path = (work / "data" if skip else work) / DAMAGED_FILE
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "reason"])
        table.writerows(row[1:] for row in rows)
    if not skip:
        first = "; ".join(f"{root / name}: {reason}" for root, name, reason in rows[:_MOST_NAMED])
        more = f"; and {len(rows) - _MOST_NAMED:,} more" if len(rows) > _MOST_NAMED else ""
        count = "1 image is" if len(rows) == 1 else f"{len(rows):,} images are"
        raise UserError(
            f"{count} damaged, listed in {path} (effvit prepare --skip-damaged leaves them out): {first}{more}"
        )
