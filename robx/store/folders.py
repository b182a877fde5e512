"""Folders that appear whole or not at all, and whose turn it is to change one.

    with new_folder(path) as folder: ...    fill a folder that then takes `path`'s place
    with lock_folder(folder): ...           work in it for hours; a second process is refused
    with wait_for(path): ...                make one thing once; a second process waits
    with turn(folder): ...                  change a file of it, in a moment; a second process waits

All locks are the kernel's: they end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from robx.errors import InputError
from robx.store.files import fsync_folder, unwritable

# The workers of a killed process hold its lock until they notice, every five seconds.
_ORPHAN_SECONDS = 10.0


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a fresh folder that takes `path`'s place, whole, when the block succeeds.

    A folder of that name is replaced, in one step where the system can. If the block raises, `path` is what it was
    before. Of several writers of one `path`, each puts a whole folder there.

    Raises:
        RobxError: no space, no permission, or a file of that name; the message says which.
    """
    place = path.resolve()  # where a link points, not the link
    try:
        with scratch_folder(place.parent, place.name) as temporary:
            yield temporary
            _fsync_tree(temporary)
            with turn(place.parent):
                _put_in_place(temporary, place)
                fsync_folder(place.parent)
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent` for unfinished work, gone at the end; what killed processes left of it goes first.

    Raises:
        RobxError: no space, no permission; the message says which.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with turn(parent):
            unfinished = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.tmp")
            for path in parent.iterdir():
                if unfinished.fullmatch(path.name):
                    remove_abandoned(path)
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
            temporary.chmod(0o755)
            held = os.open(temporary, os.O_RDONLY)
            _try_lock(held)  # who gets this lock has found an abandoned folder
    except OSError as error:
        raise unwritable(parent / name, error) from error
    try:
        yield temporary
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Change what is in `folder` while no other robx does; others wait. For moments, and never one in another."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the last one wins
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; a second robx on it is refused, a dead one's lock is taken over.

    Raises:
        InputError: another live process holds it; the message has its process id.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        _lock_or_refuse(descriptor, folder)
        with contextlib.suppress(OSError):  # on a full disk the others see no process id
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
        file = path.with_name(f".{path.name}.lock").open("a")
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        with contextlib.suppress(OSError):  # a file system without locks: both make it
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_abandoned(path: Path) -> None:
    """Remove a half-written file or scratch folder, if the process that wrote it is gone."""
    if path.is_symlink() or not path.is_dir():
        writer = re.search(r"\.(\d+)\.tmp$", path.name)
        if writer is None or writer[1] == str(os.getpid()) or not _is_alive(writer[1]):
            path.unlink(missing_ok=True)
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # its owner has just ended
        return
    try:
        if _try_lock(descriptor):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock_or_refuse(descriptor: int, folder: Path) -> None:
    """Lock an opened ``.lock`` for as long as it stays open."""
    patience = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            # The kernel drops the lock with its process, so none is ever stale.
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


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a folder that is there ends under the name `temporary`."""
    if not path.exists():
        os.replace(temporary, path)  # noqa: PTH105
        return
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file has this name", str(path))
    if _exchange(temporary, path):
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)  # noqa: PTH105
    try:
        os.replace(temporary, path)  # noqa: PTH105
    except OSError:
        os.replace(old, path)  # noqa: PTH105
        raise
    os.replace(old, temporary)  # noqa: PTH105


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names in one step; False where the system or its file system cannot (Linux's renameat2 can)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(swap(here, os.fsencode(one), here, os.fsencode(two), ctypes.c_uint(exchange)) == 0)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)
