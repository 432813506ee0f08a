"""Being asked to stop, by Ctrl-C or by SIGTERM: noted, so that work ends where it can be continued."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Request:
    """Whether, and by which signal, this process was asked to stop."""

    number: int | None = None

    @property
    def status(self) -> int:
        """Exit status of a process that ends by the signal, as shells count it: 130 or 143."""
        return 128 + (self.number or signal.SIGTERM)


@contextmanager
def noted_interrupts() -> Iterator[Request]:
    """Note the first SIGINT or SIGTERM instead of ending; a second one has its usual effect.

    Signals that the process was started to ignore stay ignored. Outside the main thread nothing is noted, as Python
    lets no other thread have signals.
    """
    request = Request()
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield request
    finally:
        for noted, handler in before.items():
            signal.signal(noted, handler)
