"""Ctrl-C and SIGTERM: the first ends a command in good order, the second at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Make the first signal a KeyboardInterrupt of its number, and let the system handle a second one.

    ``kill -INT``, an IDE's stop, ``timeout`` and ``scancel`` signal one process or a whole group; both end alike.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    before = {each: signal.signal(each, stop) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
