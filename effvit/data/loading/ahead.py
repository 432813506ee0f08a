"""Making the next batch while the one before it is in use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield what ``items`` gives, in order; a thread makes the next one meanwhile, and no more than that.

    The first is made in the thread of the caller, as what ``items`` starts there may need its signals.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        item = next(items, None)
        while item is not None:
            coming = thread.submit(next, items, None)
            yield item
            item = coming.result()
