"""Reach a device (this machine, SSH or ADB): push files, run the runner, pull its result.

SSH and ADB use the system's ``ssh``, ``scp`` and ``adb`` with their configuration, keys and jump hosts, never
interactively. All files are in one new folder on the device, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, Self
from urllib.parse import urlsplit

from robx.errors import DeviceError, InputError
from robx.runtime.bench.subprocesses import call
from robx.runtime.bench.workspace import workspace

_CONNECT_SECONDS = 15
_COPY_SECONDS = 600
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*\Z")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?\Z")
_FOLDER = re.compile(r"/[A-Za-z0-9/_.+-]*/robx-[A-Za-z0-9]{8,32}\Z")


class Transport(Protocol):
    """A connection to one device, open inside its ``with`` block."""

    kind: str  # local, ssh or adb
    address: str  # as given by the user

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Copy files (name -> local path) into `folder` inside the new folder on the device."""

    def run(self, folder: str, arguments: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run Python with `arguments` in `folder`; returns the exit status and the end of its output."""

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back; returns its path."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_transport(device: str, *, python: str | None = None) -> Transport:
    """The transport to ``local``, ``ssh://[user@]host[:port]`` or ``adb://serial``.

    `python` is the Python command on the device, split as a shell does; None: this Python locally, ``python3``
    elsewhere.

    Raises:
        InputError: the address or the Python command is not valid.
    """
    try:
        command = shlex.split(python or "")
    except ValueError as error:
        raise InputError(f"python {python!r} is not a command ({error}): close its quotes") from error
    if not device.isprintable() or any(character.isspace() for character in device):
        raise InputError(f"device {device!r} contains spaces or control characters: give ssh://user@host[:port]")
    if device == "local":
        return LocalTransport(command or [sys.executable])
    try:
        parts = urlsplit(device)
        host, user, port = parts.hostname or "", parts.username, parts.port
    except ValueError as error:
        raise InputError(f"device {device!r} is not an address ({error}): give ssh://user@host[:port]") from error
    if port == 0:
        raise InputError(f"device {device!r} has port 0: give a port from 1 to 65535, or none")
    if parts.scheme == "ssh":
        # urlsplit converts the host to lower case, but names in ~/.ssh/config are case-sensitive.
        host = parts.netloc.rpartition("@")[2]
        host = host[1 : host.index("]")] if host.startswith("[") else host.split(":")[0]
        odd = not _HOST.match(host) or (user is not None and not _USER.match(user))
        if odd or parts.path not in ("", "/") or parts.query or parts.fragment or parts.password:
            raise InputError(f"device {device!r} is not an address: give ssh://user@host[:port], without a password")
        return SshTransport(device, f"{user}@{host}" if user else host, port, command or ["python3"])
    if parts.scheme == "adb":
        serial = device.removeprefix("adb://")
        if serial and not _HOST.match(serial):
            raise InputError(f"device {device!r} has no valid serial number: adb devices lists them")
        return AdbTransport(device, serial or None, command or ["python3"])
    raise InputError(f"device {device!r} is unknown: give local, ssh://user@host[:port] or adb://serial")


class LocalTransport:
    """This machine: a subprocess in a temporary folder, so the code path is the same as on a device."""

    kind, address = "local", "local"

    def __init__(self, python: list[str]) -> None:
        self._python, self._root, self._stack = python, Path(), contextlib.ExitStack()

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Hard-link files where possible, else copy them."""
        _lay(files, self._root / folder)

    def run(self, folder: str, arguments: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run Python in `folder`."""
        return call([*self._python, *arguments], timeout=timeout, what="the runner", cwd=self._root / folder)

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back."""
        source = self._root / folder / name
        if not source.is_file():
            raise DeviceError(f"the runner wrote no {name}")
        return Path(shutil.copy(source, into / name))

    def __enter__(self) -> Self:
        self._root = self._stack.enter_context(workspace())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class SshTransport:
    """A machine reached by the system's ssh and scp."""

    kind = "ssh"

    def __init__(self, address: str, destination: str, port: int | None, python: list[str]) -> None:
        self.address, self._destination, self._python, self._root = address, destination, python, ""
        self._ssh = ["ssh", "-T", *_SSH_OPTIONS, *(("-p", str(port)) if port else ())]
        self._scp = ["scp", "-q", "-r", *_SSH_OPTIONS, *(("-P", str(port)) if port else ())]
        bare = destination.rpartition("@")
        self._target = f"{bare[0]}{bare[1]}[{bare[2]}]" if ":" in bare[2] else destination

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """One scp of a staged folder."""
        with _staged(files, folder) as staged:
            command = [*self._scp, "--", str(staged), f"{self._target}:{self._root}/"]
            status, text = call(command, timeout=_COPY_SECONDS, what=f"copying to {self.address}")
            _check(status, text, f"copying to {self.address}")

    def run(self, folder: str, arguments: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run Python on the device; a failure of ssh raises DeviceError, a failure of the runner is its status."""
        status, text = self._shell(_script(self._root, folder, [*self._python, *arguments]), timeout)
        if status == 255:
            raise DeviceError(f"the connection to {self.address} was lost: {_last_line(text) or 'ssh printed nothing'}")
        return status, text

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back."""
        source = f"{self._target}:{self._root}/{folder}/{name}"
        status, text = call([*self._scp, "--", source, str(into)], timeout=_COPY_SECONDS, what=f"copying {name} back")
        _check(status, text, f"copying {name} from {self.address}")
        if not (into / name).is_file():
            raise DeviceError(f"{self.address} sent no {name}")
        return into / name

    def __enter__(self) -> Self:
        status, text = self._shell('mktemp -d "${TMPDIR:-/tmp}/robx-XXXXXXXXXX"', 2 * _CONNECT_SECONDS)
        doing = "reaching" if status == 255 else "creating a folder (in TMPDIR, else /tmp) on"
        _check(status, text, f"{doing} {self.address}")
        self._root = _folder(text, self.address)
        return self

    def __exit__(self, *_: object) -> None:
        # A runner that has just lost its connection may still write a file before it ends.
        remove = f"rm -rf -- {shlex.quote(self._root)}"
        with contextlib.suppress(DeviceError):
            self._shell(f"{remove} || {{ sleep 1; {remove}; }}", 2 * _CONNECT_SECONDS)

    def _shell(self, script: str, timeout: float) -> tuple[int, str]:
        # The login shell may be any; the script is for sh.
        command = [*self._ssh, "--", self._destination, f"sh -c {shlex.quote(script)}"]
        return call(command, timeout=timeout, what=self.address)


class AdbTransport:
    """An Android device reached by adb; it needs its own Python (e.g. Termux), given by ``--python``."""

    kind = "adb"

    def __init__(self, address: str, serial: str | None, python: list[str]) -> None:
        self.address, self._python, self._root = address, python, ""
        self._adb = ["adb", *(("-s", serial) if serial else ())]

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """One adb push of a staged folder."""
        with _staged(files, folder) as staged:
            command = [*self._adb, "push", str(staged), f"{self._root}/"]
            _check(*call(command, timeout=_COPY_SECONDS, what="adb push"), f"copying to {self.address}")

    def run(self, folder: str, arguments: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run Python on the device; a failure of adb raises DeviceError, a failure of the runner is its status."""
        script = _script(self._root, folder, [*self._python, *arguments])
        status, text = call([*self._adb, "shell", script], timeout=timeout, what=self.address)
        if status and re.match(r"(adb: |error: )", text):
            raise DeviceError(f"the connection to {self.address} was lost: {_last_line(text)}")
        return status, text

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back."""
        command = [*self._adb, "pull", f"{self._root}/{folder}/{name}", str(into / name)]
        _check(*call(command, timeout=_COPY_SECONDS, what="adb pull"), f"copying {name} from {self.address}")
        if not (into / name).is_file():
            raise DeviceError(f"{self.address} sent no {name}")
        return into / name

    def __enter__(self) -> Self:
        root = f"/data/local/tmp/robx-{uuid.uuid4().hex}"
        command = [*self._adb, "shell", f"mkdir -p {root} && echo {root}"]
        status, text = call(command, timeout=2 * _CONNECT_SECONDS, what=self.address)
        _check(status, text, f"reaching {self.address}")
        self._root = _folder(text, self.address)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(DeviceError):
            call([*self._adb, "shell", f"rm -rf {self._root}"], timeout=2 * _CONNECT_SECONDS, what=self.address)


def _script(root: str, folder: str, command: list[str]) -> str:
    """A script for the device's sh. It waits for the command, since ssh does not report one that a signal ended."""
    return f"cd {shlex.quote(f'{root}/{folder}')} && {shlex.join(command)}; exit $?"


def _folder(text: str, address: str) -> str:
    """The folder's name in the device's output, which is not trusted."""
    last = _last_line(text)
    if not _FOLDER.match(last) or ".." in PurePosixPath(last).parts:
        raise DeviceError(f"{address} answered {last[:80]!r} where a folder name was expected: check its login shell")
    return last


@contextlib.contextmanager
def _staged(files: Mapping[str, Path], folder: str) -> Iterator[Path]:
    """Yield a local folder named `folder` that contains `files`, so that no file name reaches a command line."""
    with workspace() as root:
        _lay(files, root / folder)
        yield root / folder


def _lay(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system
            shutil.copy(path, target)


def _check(status: int, text: str, doing: str) -> None:
    if status:
        raise DeviceError(f"{doing} failed: {_last_line(text) or f'exit status {status}'}")


def _last_line(text: str) -> str:
    return text.splitlines()[-1].strip()[:300] if text else ""
