"""Paths told apart by as little of them as that takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def path_ends(paths: Sequence[str]) -> list[str]:
    """The shortest end of each path that no other one has; "" for an empty path and for one that occurs twice."""
    ends = []
    for path in paths:
        parts = PurePath(path).parts
        tails = ("/".join(parts[-length:]) for length in range(1, len(parts) + 1))
        ends.append(next((tail for tail in tails if sum(_ends_with(other, tail) for other in paths) == 1), ""))
    return ends


def _ends_with(path: str, tail: str) -> bool:
    return path == tail or path.endswith(f"/{tail}")
