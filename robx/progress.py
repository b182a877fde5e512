"""What long work reports: progress, as a callback of (done, total, note), and facts. The caller shows them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]


class Fact(str):
    """A line about what goes as it should, such as where a run resumes; a command with --quiet leaves it out.

    Lines that a user has to know (warnings, what is skipped, guessed or replaced) are plain strings.
    """

    __slots__ = ()


def silent(done: int, total: int, note: str) -> None:
    """A Progress that shows nothing."""
