"""How long work tells of itself: a callback of (done, total, note). Who prints it is the command's business."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """A Progress that tells nobody."""
