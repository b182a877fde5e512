"""Arrays that robx computes again when their file is lost: listings and indexes, kept from one start to the next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import RobxError
from robx.store.files import write_atomically


def keep_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and plain facts to an .npz; a file that cannot be written costs only time."""
    packed = np.frombuffer(json.dumps(facts).encode(), np.uint8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays, facts=packed)  # type: ignore[arg-type]

    with contextlib.suppress(RobxError):
        write_atomically(path, write)


def kept_arrays(path: Path, *, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and facts in `path`; None if they are missing, damaged, or of another ``facts["version"]``."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            if facts["version"] != version:
                return None
            return {name: stored[name] for name in stored.files if name != "facts"}, facts
    except Exception:  # a damaged file raises whatever its parser meets
        return None
