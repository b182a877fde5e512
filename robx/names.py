"""Names that nearly exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str, prefix: str = "") -> str:
    """A hint for an error line: the three known names nearest to `name`, each after `prefix`, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {', '.join(prefix + n for n in near)}?" if near else otherwise
