"""Copy files to a device by their content: what is already there is not sent again, and no file name is a command.

On the device, `root/files/` contains each file once, named by its SHA-256; the folders of the jobs link to them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from robx.errors import DeviceError
from robx.runtime.bench.workspace import workspace
from robx.store.files import sha256_file

STORE = "files"  # in the device's folder
_PLACE = "place.sh"
_FOLDER = re.compile(r"/[A-Za-z0-9/_.+-]*/robx-[A-Za-z0-9]{8,32}\Z")


def push_new(
    files: Mapping[str, Path],
    folder: str,
    *,
    sent: set[str],
    copy: Callable[[Path], None],
    place: Callable[[str], None],
) -> None:
    """Copy those of `files` (name -> local path) that are not on the device yet, then link them into `folder`.

    Args:
        files: the names may contain any character and subfolders.
        folder: in the device's folder.
        sent: SHA-256 of the files that are on the device; updated.
        copy: copies a local folder, with its name, into the device's folder.
        place: runs a script, given by its path in the device's folder.
    """
    hashes = {name: sha256_file(path) for name, path in files.items()}
    new = {hashes[name]: path for name, path in files.items() if hashes[name] not in sent}
    with workspace() as root:
        lay(new, root / STORE)
        (root / STORE / _PLACE).write_text(_script(hashes, folder))
        copy(root / STORE)
    sent.update(new)
    place(f"{STORE}/{_PLACE}")


def lay(files: Mapping[str, Path], folder: Path) -> None:
    """Hard-link `files` into a local folder where possible, else copy them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system
            shutil.copy(path, target)


def _script(hashes: Mapping[str, str], folder: str) -> str:
    """A script for the device's sh, run in its folder. Android's policy may forbid hard links: then it copies."""
    lines = ["set -e"]
    parents = sorted({str(PurePosixPath(folder, name).parent) for name in hashes})
    lines += [f"mkdir -p -- {shlex.quote(parent)}" for parent in parents]
    for name, digest in hashes.items():
        source, target = f"{STORE}/{digest}", shlex.quote(str(PurePosixPath(folder, name)))
        lines.append(f"ln -f -- {source} {target} 2> /dev/null || cp -- {source} {target}")
    return "\n".join(lines) + "\n"


def folder_in(text: str, address: str) -> str:
    """The name of the device's folder, from the last line of its output, which is not trusted.

    Raises:
        DeviceError: the line is not the name of such a folder.
    """
    last = last_line(text)
    if not _FOLDER.match(last) or ".." in PurePosixPath(last).parts:
        raise DeviceError(f"{address} answered {last[:80]!r} where a folder name was expected: check its login shell")
    return last


def pulled(path: Path, address: str) -> Path:
    """`path`, to which a file was copied from the device.

    Raises:
        DeviceError: it is not there.
    """
    if not path.is_file():
        raise DeviceError(f"{address} sent no {path.name}")
    return path


def check(status: int, said: str, doing: str) -> None:
    """Raise DeviceError with what a command said, if it failed."""
    if status:
        raise DeviceError(f"{doing} failed: {said or f'exit status {status}'}")


def last_line(text: str) -> str:
    """The last line of a command's output, shortened."""
    return text.splitlines()[-1].strip()[:300] if text else ""
