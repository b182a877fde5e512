"""Locks on folders and files.

    with lock_folder(folder): ...    work in it for hours; a second process is refused
    with wait_for(path): ...         make one thing once; a second process waits
    with turn(folder): ...           change a file in it, briefly; a second process waits

All are flock(2): the kernel releases them when their process ends, however it ends, so there are no stale locks. (The
filelock package uses the same call, but needs a lock file beside every folder, which it truncates even through a link.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from robx.errors import InputError
from robx.store.files import unwritable

# The loader workers of a killed process inherit its lock, and look for their parent every five seconds.
_ORPHAN_SECONDS = 10.0


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; a second robx is refused, and the lock of a dead one is taken over.

    Raises:
        InputError: another live process holds it (the message has its process id), or ``.lock`` is not a lock file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    descriptor = _open_lock(folder / ".lock")
    try:
        _lock_or_refuse(descriptor, folder)
        with contextlib.suppress(OSError):  # on a full disk others see no process id
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def wait_for(path: Path) -> Iterator[None]:
    """Hold the right to make `path`; other processes that want to make it wait, and then find it made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    descriptor = _open_lock(path.with_name(f".{path.name}.lock"))
    try:
        with contextlib.suppress(OSError):  # a file system without locks: both processes make it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Change files in `folder` while no other robx does; others wait. Keep it short, and never nest two of them."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the last writer wins
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open or create a lock file: empty or with a process id, never a link, and nobody else's file."""
    try:
        # O_NONBLOCK: opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path} is a link, and a lock file must not be: remove it") from None
        raise unwritable(path.parent, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not re.fullmatch(rb"\d*", os.pread(descriptor, 32, 0)):
        os.close(descriptor)
        raise InputError(f"{path} is not a lock file that robx wrote: move it away, or choose another folder")
    return descriptor


def _lock_or_refuse(descriptor: int, folder: Path) -> None:
    """Lock an opened ``.lock`` for as long as it stays open."""
    patience = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            if _is_alive(holder) or time.monotonic() > patience:
                who = f"process {holder}" if holder else "another process"
                raise InputError(f"{folder} is in use by {who}: wait for it, or choose another folder") from None
            time.sleep(0.2)
        except OSError as error:
            raise InputError(f"{folder} cannot be locked ({error.strerror}): choose one on another disk") from error


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True
