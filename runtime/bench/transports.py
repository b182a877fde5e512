"""Reach a device (this machine, SSH or ADB): push files, run commands, pull results.

All files are in one new folder on the device, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import urlsplit

from robx.errors import DeviceError, InputError
from robx.runtime.bench.over_adb import AdbTransport
from robx.runtime.bench.over_ssh import SshTransport
from robx.runtime.bench.staging import lay
from robx.runtime.bench.subprocesses import call
from robx.runtime.bench.workspace import workspace

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*\Z")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?\Z")


class Transport(Protocol):
    """A connection to one device, open inside its ``with`` block."""

    kind: str  # local, ssh or adb
    address: str  # as given by the user

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Make files (name -> local path) appear in `folder` inside the new folder on the device."""

    def run(self, folder: str, command: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run a command in `folder`; returns its exit status and the end of its output.

        Raises:
            DeviceError: it did not end within `timeout` seconds, or the connection was lost.
        """

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back; returns its path."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_transport(device: str) -> Transport:
    """The transport to ``local``, ``ssh://[user@]host[:port]`` or ``adb://[serial]``.

    Raises:
        InputError: the address is not valid.
    """
    if not device.isprintable() or any(character.isspace() for character in device):
        raise InputError(f"--device {device!r} contains spaces or control characters: give ssh://user@host[:port]")
    if device == "local":
        return LocalTransport()
    try:
        parts = urlsplit(device)
        host, user, port = parts.hostname or "", parts.username, parts.port
    except ValueError as error:
        raise InputError(f"--device {device!r} is not an address ({error}): give ssh://user@host[:port]") from error
    if port == 0:
        raise InputError(f"--device {device!r} has port 0: give a port from 1 to 65535, or none")
    if parts.scheme == "ssh":
        # urlsplit converts the host to lower case, but names in ~/.ssh/config are case-sensitive.
        host = parts.netloc.rpartition("@")[2]
        host = host[1 : host.index("]")] if host.startswith("[") else host.split(":")[0]
        odd = not _HOST.match(host) or (user is not None and not _USER.match(user))
        if odd or parts.path not in ("", "/") or parts.query or parts.fragment or parts.password:
            raise InputError(f"--device {device!r} is not an address: give ssh://user@host[:port], without a password")
        return SshTransport(device, f"{user}@{host}" if user else host, port)
    if parts.scheme == "adb":
        serial = device.removeprefix("adb://")
        if serial and not _HOST.match(serial):
            raise InputError(f"--device {device!r} has no valid serial number: adb devices lists them")
        return AdbTransport(device, serial or None)
    raise InputError(f"--device {device!r} is unknown: give local, ssh://user@host[:port] or adb://serial")


class LocalTransport:
    """This machine: a subprocess in a temporary folder, so the code path is the same as on a device."""

    kind, address = "local", "local"

    def __init__(self) -> None:
        self._root, self._stack = Path(), contextlib.ExitStack()

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """Hard-link files where possible, else copy them."""
        lay(files, self._root / folder)

    def run(self, folder: str, command: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run a command in `folder`."""
        return call([*command], timeout=timeout, what="the runner", cwd=self._root / folder)

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
