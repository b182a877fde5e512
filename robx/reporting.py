"""How a call of the Python API reports its progress and its messages.

On a terminal it draws the commands' progress bar, in a notebook it rewrites one line, and elsewhere (a script whose
output goes to a file, a service) it writes to the logger "robx": progress as INFO, messages as WARNING.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

from robx.errors import visible
from robx.progress import Progress, silent

Say = Callable[[str], None]
Reporting = Progress | Literal["auto"] | None

_LOG = logging.getLogger("robx")
_LOG_SECONDS = 15.0
_NOTEBOOK_SECONDS = 0.5
_NOTEBOOK_WIDTH = 100


@contextlib.contextmanager
def reporting(progress: Reporting) -> Iterator[tuple[Progress, Say]]:
    """The two callbacks of a long call: of (done, total, note), and of one message.

    Args:
        progress: "auto" chooses as described above; a callable is called with (done, total, note); None reports no
            progress. In the last two cases messages go to the logger.
    """
    if callable(progress):
        yield progress, _LOG.warning
    elif progress is None:
        yield silent, _LOG.warning
    elif in_notebook():
        line = _NotebookLine()
        try:
            yield line.show, line.say
        finally:
            line.end()
    elif sys.stderr is not None and sys.stderr.isatty():
        from robx.console import progress_bar, say

        with progress_bar() as bar:
            yield bar, say
    else:
        yield _log_lines(), _LOG.warning


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel; IPython on a terminal is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def describe(done: int, total: int, note: str) -> str:
    """One line of progress."""
    return f"{note}: {done} of {total}" if total > 1 else note


class _NotebookLine:
    """One line of standard error that is written over itself."""

    def __init__(self) -> None:
        self._written = -_NOTEBOOK_SECONDS
        self._open = False

    def show(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - self._written < _NOTEBOOK_SECONDS and done < total:
            return
        self._written, self._open = now, True
        text = visible(describe(done, total, note))[:_NOTEBOOK_WIDTH]
        sys.stderr.write(f"\r{text:<{_NOTEBOOK_WIDTH}}")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        self.end()
        sys.stderr.write(f"{visible(text)}\n")

    def end(self) -> None:
        if self._open:
            sys.stderr.write("\n")
        self._open = False


def _log_lines() -> Progress:
    written = -_LOG_SECONDS

    def show(done: int, total: int, note: str) -> None:
        nonlocal written
        now = time.monotonic()
        if now - written < _LOG_SECONDS and done < total:
            return
        written = now
        _LOG.info("%s", visible(describe(done, total, note)))

    return show
