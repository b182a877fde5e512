"""Stopping a run by signal: it finishes its step, writes a checkpoint, and exits with status 75.

SIGTERM, SIGUSR1 (a scheduler's warning) and a first SIGINT request the stop; a second SIGINT ends the run at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether a signal has requested the end of the run, and which one."""

    def __init__(self) -> None:
        """Start without a request."""
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Record a signal; a second SIGINT kills the loader's workers and raises KeyboardInterrupt."""
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            # They ignore all other signals, and one that hangs in a read would be waited for.
            for worker in multiprocessing.active_children():
                worker.kill()
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the signals inside the block and restore the previous handlers after it."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can set handlers
        return
    before = {number: signal.signal(number, request) for number in _ASKING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
