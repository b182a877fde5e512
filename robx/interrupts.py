"""Ending on a signal: the signal is noted as it arrives, so that no library can hide it.

Python raises KeyboardInterrupt wherever the program happens to be. An import or a callback of a library may swallow it
or turn it into an error of its own, which would then be blamed on the model or on the user's files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_arrived: signal.Signals | None = None


def arrived() -> signal.Signals | None:
    """The first signal of the innermost `ended_by_signals` block; None if there was none."""
    return _arrived


def check() -> None:
    """Raise KeyboardInterrupt if a signal has arrived, whatever became of the first KeyboardInterrupt."""
    if _arrived is not None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """In this block SIGINT, SIGTERM and SIGHUP are noted and raise KeyboardInterrupt, so that clean-up is done.

    A second SIGINT interrupts the clean-up; a second SIGTERM or SIGHUP does not. Signals that are ignored (nohup, a
    shell's background job) or handled by the caller stay so.
    """
    global _arrived
    _arrived = None
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers
        return
    owner = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        global _arrived
        if os.getpid() != owner and number != signal.SIGINT:  # a forked child ends as it would without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first = _arrived is None
        if first:
            _arrived = signal.Signals(number)
        if first or number == signal.SIGINT:
            raise KeyboardInterrupt

    default = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, note) for number in _ENDING if signal.getsignal(number) in default}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block, which must be short, has ended; then deliver the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
