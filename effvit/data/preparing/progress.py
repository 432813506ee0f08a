"""A progress bar for images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def image_bar(description: str, total: int, already: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time to go; yields what sets it to so many images, beyond those ``already`` there."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("to go"), console=Console(stderr=True)) as progress:
        if already:
            progress.console.print(f"{description}: {already:,} images are there from an interrupted run")
        task = progress.add_task(description, total=total, completed=already)
        yield lambda images: progress.update(task, completed=already + images)
        progress.update(task, completed=total)
