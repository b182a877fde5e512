"""One write at a time in a thread, while training goes on with the state that has been copied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class BackgroundWriter:
    """Writes in the background, one after another; a context manager that waits for the last one.

    A write that fails raises its error in the thread that trains: at the next ``check``, ``start`` or ``wait``.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Call `write` in the background, after the one before has ended.

        Raises:
            RobxError: what the write before raised.
        """
        self.wait()
        # A daemon: a second Ctrl-C ends the process at once, as SIGKILL does, and the files of a write appear whole or
        # not at all.
        self._thread = threading.Thread(target=self._run, args=(write,), name="robx-checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            RobxError: what the write raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._thread is not None:  # the state before what went wrong is whole
            self._thread.join()
