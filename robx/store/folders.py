"""Folders that appear whole or not at all, and what killed processes left behind.

    with new_folder(path) as folder: ...             fill a folder that then takes `path`'s place
    with scratch_folder(parent, name) as folder: ... unfinished work, removed at the end
    require_writable(folder, remedy=...)             refuse it before the work, not after
    require_replaceable(path, remedy=...)            the same for a `new_folder`

robx removes only what it wrote: unfinished files and folders have names that nothing else has, and a replaced folder
keeps everything in it that the caller does not list as robx's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from robx.errors import InputError, NoSpace
from robx.store.files import LEFTOVER, fsync_folder, random_name, try_lock, unwritable
from robx.store.locks import turn


@contextlib.contextmanager
def new_folder(path: Path, *, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield a fresh folder that takes `path`'s place, whole, when the block succeeds.

    A folder of that name is replaced, in one step where the system can. If the block raises, `path` is what it was
    before. Of several writers of one `path`, each puts a whole folder there.

    Args:
        path: the folder; where a link points, if it is one.
        ours: the files of an existing folder that robx wrote, relative to it. They are removed; all other files move
            into the new folder.

    Raises:
        RobxError: no space, no permission, a file of that name, or a file of the new folder that would replace one that
            is not in `ours`; the message says which.
    """
    place = path.resolve()
    try:
        with scratch_folder(place.parent, place.name) as temporary:
            yield temporary
            _fsync_tree(temporary)
            with turn(place.parent):
                if place.is_dir():
                    _keep_others(place, temporary, ours)
                _put_in_place(temporary, place)
                fsync_folder(place.parent)
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent` for unfinished work, removed at the end; those of killed processes are removed first.

    Raises:
        RobxError: no space, no permission; the message says which.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with turn(parent):
            remove_leftovers(parent, name)
            temporary = parent / random_name(name)
            temporary.mkdir()
            held = os.open(temporary, os.O_RDONLY)
            try_lock(held)  # whoever gets this lock has found an abandoned folder
    except OSError as error:
        raise unwritable(parent / name, error) from error
    try:
        yield temporary
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable(folder: Path, *, remedy: str) -> None:
    """Refuse, before long work starts, a folder in which nothing can be written, or that cannot be made.

    Permissions do not tell enough (root has them all, and still nothing can be made in /proc): a hidden folder is made
    and removed, and the time of the last change put back, so that a dry run leaves no trace.

    Args:
        folder: need not exist, and neither need its parents.
        remedy: what to do about it, the end of the message.

    Raises:
        InputError: `folder`, or the nearest parent that exists, is not a folder, is read-only or cannot be written.
        NoSpace: the disk is full.
    """
    place = folder.absolute()
    nearest = next(path for path in (place, *place.parents) if os.path.lexists(path))
    shown = folder if nearest == place else nearest
    if not nearest.is_dir():
        raise InputError(f"{shown} is not a folder: {remedy}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{shown} is read-only: {remedy}")
    probe = nearest / random_name("probe")
    try:
        before = nearest.stat()
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if isinstance(refused := unwritable(nearest, error), NoSpace):
            raise refused from error
        raise InputError(f"{shown} cannot be written ({error.strerror}): {remedy}") from error
    with contextlib.suppress(OSError):  # another user's folder
        os.utime(nearest, ns=(before.st_atime_ns, before.st_mtime_ns))


def require_replaceable(path: Path, *, remedy: str) -> None:
    """Refuse, before long work starts, a path at which `new_folder` could put nothing; see `require_writable`.

    Raises:
        InputError: it is a file or a mount point, or its parent cannot be written.
        NoSpace: the disk is full.
    """
    place = path.resolve()
    if os.path.lexists(place) and not place.is_dir():
        raise InputError(f"{path} is not a folder: {remedy}")
    if place.is_mount():
        raise InputError(f"{path} is a mount point, which cannot be replaced: {remedy}")
    require_writable(place.parent, remedy=remedy)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the unfinished files and folders of killed robx processes directly in `folder`; nothing else.

    `name` limits it to those that were to become `name`. A file or folder that a live process writes stays.
    """
    try:
        found = [(path, LEFTOVER.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError:
        return
    for path, match in found:
        if match is None or name not in (None, match["name"]) or path.is_symlink():
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # its owner has just finished it
            continue
        try:
            if try_lock(descriptor):
                _remove_leftover(path, folder / match["name"], old=match["kind"] == "old")
        finally:
            os.close(descriptor)


def _remove_leftover(path: Path, place: Path, *, old: bool) -> None:
    if old and not place.exists():  # its writer died between the two steps of a replacement
        os.replace(path, place)  # noqa: PTH105
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _keep_others(old: Path, new: Path, ours: Collection[str], below: str = "") -> None:
    """Give every file of the folder `old` that is not in `ours` a second name in `new`."""
    for entry in sorted(os.scandir(old / below), key=lambda entry: entry.name):
        name = f"{below}{entry.name}"
        if name in ours or LEFTOVER.fullmatch(entry.name):
            continue
        target = new / name
        if entry.is_dir(follow_symlinks=False):
            if target.exists() or any(own.startswith(f"{name}/") for own in ours):
                if target.exists() and not target.is_dir():
                    raise _foreign(old / name)
                _keep_others(old, new, ours, f"{name}/")
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(old / name, target, symlinks=True, copy_function=_second_name)
            continue
        if target.exists() or target.is_symlink():
            raise _foreign(old / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        _second_name(os.fspath(old / name), os.fspath(target))


def _second_name(source: str, target: str) -> None:
    """A hard link, which costs nothing and follows later writes; a copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _foreign(path: Path) -> InputError:
    return InputError(f"{path} was not written by robx and would be replaced: move it away, or choose another folder")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; an existing folder ends up under the name `temporary`."""
    if not path.exists():
        os.replace(temporary, path)  # noqa: PTH105
        return
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file has this name", str(path))
    if _exchange(temporary, path):
        return
    old = path.with_name(random_name(path.name, kind="old"))
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
