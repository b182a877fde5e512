"""Progress of long work, as a callback of (done, total, note). The caller decides how it is shown."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """A Progress that shows nothing."""


def duration(seconds: float) -> str:
    """A time in the unit in which it is easiest to read: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    if seconds < 2 * 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
