"""Silencing converters, which log, warn and print on their own; their results are compared with PyTorch afterwards."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence a library's prints, progress bars, warnings and log lines below ERROR, but not its exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    nothing = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
