"""The temporary folders of a benchmark. A killed process leaves its folder; the next benchmark removes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from robx.store.files import try_lock, unwritable

_PREFIX = "robx-bench-"


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Yield a new folder that only this user can read, in the system's temporary folder; removed at the end.

    Raises:
        RobxError: the temporary folder cannot be written.
    """
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    try:
        folder, lock = _make(parent)
    except OSError as error:
        raise unwritable(parent, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor whose lock says that its process is alive."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        # Another process may take an empty folder that is not locked yet for an abandoned one.
        if try_lock(lock) and folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose processes are dead; the kernel released their locks."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # a link, a file, another user's, or just removed
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid() and try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
