"""Where robx keeps what it fetched or computed and can fetch or compute again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$ROBX_CACHE``, else ``robx`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robx"
    return Path(os.environ.get("ROBX_CACHE") or default)
