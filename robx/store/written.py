"""The record of which files in a folder robx wrote: it removes and replaces these alone.

``.robx-written`` in the folder has one relative path a line, as JSON, written before the file itself. A folder that
users may put files of their own into (a run) has one; a folder that is always replaced whole (a bundle) lists its files
in its manifest instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from robx.errors import InputError
from robx.store.files import fsync_folder, read_bytes, unwritable, write_bytes

RECORD = ".robx-written"


class Written:
    """What robx wrote in one folder. Use it under the folder's lock."""

    def __init__(self, folder: Path) -> None:
        """Read the record; a folder without one has nothing that robx wrote.

        Raises:
            InputError: ``.robx-written`` is a link.
            ArtifactError: it cannot be read.
        """
        self.folder = folder
        path = folder / RECORD
        if path.is_symlink():
            raise InputError(f"{path} is a link, and robx does not follow it: remove it")
        self._names: dict[str, None] = dict.fromkeys(_names_in(read_bytes(path))) if path.exists() else {}

    def __contains__(self, name: str) -> bool:
        """Whether robx wrote `name`, relative to the folder, or anything below it."""
        return any(_is_below(known, name) for known in self._names)

    def __iter__(self) -> Iterator[str]:
        """The recorded files, in the order in which they were first written."""
        return iter(tuple(self._names))

    def check(self, *names: str) -> None:
        """Refuse to write a file that exists already and that robx did not write; nothing is recorded.

        Raises:
            InputError: the message names the file.
        """
        for name in names:
            if name not in self._names and os.path.lexists(self.folder / name):
                raise InputError(
                    f"{self.folder / name} was not written by robx and would be replaced: move it away, or choose "
                    "another folder"
                )

    def claim(self, *names: str) -> None:
        """Record files that are about to be written.

        Raises:
            InputError: one exists already and robx did not write it; nothing is recorded then.
            RobxError: the record cannot be written.
        """
        self.check(*names)
        self.adopt(*names)

    def adopt(self, *names: str) -> None:
        """Record files that exist already and that the caller knows to be robx's own."""
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        if not new:
            return
        for name in new:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(f"{name!r} is outside of {self.folder}: robx records only files inside it")
        path = self.folder / RECORD
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                # The first newline ends a line that a killed process left unfinished.
                os.write(descriptor, "".join(f"\n{json.dumps(name)}" for name in new).encode() + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if fresh:
                fsync_folder(self.folder)
        except OSError as error:
            raise unwritable(path, error) from error
        self._names.update(dict.fromkeys(new))

    def remove(self, *names: str) -> None:
        """Remove the recorded files that are one of `names` or below it, and the folders that become empty.

        Raises:
            InputError: a folder on the way to one of them is a link, which may lead to others' files; nothing is
                removed then.
            RobxError: no permission.
        """
        found = [known for known in self._names if any(_is_below(known, name) for name in names)]
        folders = {parent for name in found for parent in PurePosixPath(name).parents if parent.name}
        for parent in folders:
            if (self.folder / parent).is_symlink():
                raise InputError(f"{self.folder / parent} is a link, and robx removes nothing behind it: remove it")
        for name in found:
            path = self.folder / name
            try:
                if os.path.lexists(path) and not stat.S_ISDIR(path.lstat().st_mode):
                    path.unlink()
            except OSError as error:
                raise unwritable(path, error) from error
        for parent in sorted(folders, key=lambda parent: -len(parent.parts)):
            with contextlib.suppress(OSError):  # others' files are in it
                (self.folder / parent).rmdir()
        # Last: a process killed before this leaves names without files, never files without names.
        gone = set(found)
        if gone:
            self._names = {name: None for name in self._names if name not in gone}
            write_bytes(self.folder / RECORD, "".join(f"{json.dumps(name)}\n" for name in self._names).encode())


def _names_in(text: bytes) -> Iterator[str]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # an unfinished line: its file was not written
            name = json.loads(line)
            if isinstance(name, str):
                yield name


def _is_below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder.rstrip('/')}/")
