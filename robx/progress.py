"""Progress of long work, as a callback of (done, total, note). The caller decides how it is shown."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """A Progress that shows nothing."""
