"""A machine reached by the system's ssh and scp, with their configuration, keys and jump hosts; never interactively."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from robx.errors import DeviceError
from robx.runtime.bench.staging import check, folder_in, last_line, pulled, push_new
from robx.runtime.bench.subprocesses import call

CONNECT_SECONDS = 15
_COPY_SECONDS = 600
_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)


class SshTransport:
    """A machine reached by the system's ssh and scp."""

    kind = "ssh"

    def __init__(self, address: str, destination: str, port: int | None) -> None:
        self.address, self._destination, self._root = address, destination, ""
        self._sent: set[str] = set()
        self._ssh = ["ssh", "-T", *_OPTIONS, *(("-p", str(port)) if port else ())]
        self._scp = ["scp", "-q", "-r", *_OPTIONS, *(("-P", str(port)) if port else ())]
        bare = destination.rpartition("@")
        self._target = f"{bare[0]}{bare[1]}[{bare[2]}]" if ":" in bare[2] else destination

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """One scp of what the device does not have yet, and one script that links it."""
        push_new(files, folder, sent=self._sent, copy=self._copy, place=self._place)

    def run(self, folder: str, command: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run a command on the device; a failure of ssh raises DeviceError, that of the command is its status."""
        # The shell waits for the command, since ssh does not report one that a signal ended.
        there = shlex.quote(f"{self._root}/{folder}")
        status, text = self._shell(f"cd {there} && {shlex.join(command)}; exit $?", timeout)
        if status == 255:
            raise DeviceError(f"the connection to {self.address} was lost: {last_line(text) or 'ssh printed nothing'}")
        return status, text

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back."""
        source = f"{self._target}:{self._root}/{folder}/{name}"
        status, text = call([*self._scp, "--", source, str(into)], timeout=_COPY_SECONDS, what=f"copying {name} back")
        check(status, last_line(text), f"copying {name} from {self.address}")
        return pulled(into / name, self.address)

    def __enter__(self) -> Self:
        status, text = self._shell('mktemp -d "${TMPDIR:-/tmp}/robx-XXXXXXXXXX"', 2 * CONNECT_SECONDS)
        doing = "reaching" if status == 255 else "creating a folder (in TMPDIR, else /tmp) on"
        check(status, last_line(text), f"{doing} {self.address}")
        self._root = folder_in(text, self.address)
        return self

    def __exit__(self, *_: object) -> None:
        # A runner that has just lost its connection may still write a file before it ends.
        remove = f"rm -rf -- {shlex.quote(self._root)}"
        with contextlib.suppress(DeviceError):
            self._shell(f"{remove} || {{ sleep 1; {remove}; }}", 2 * CONNECT_SECONDS)

    def _copy(self, folder: Path) -> None:
        command = [*self._scp, "--", str(folder), f"{self._target}:{self._root}/"]
        status, text = call(command, timeout=_COPY_SECONDS, what=f"copying to {self.address}")
        check(status, last_line(text), f"copying to {self.address}")

    def _place(self, script: str) -> None:
        status, text = self._shell(f"cd {shlex.quote(self._root)} && sh {script}", _COPY_SECONDS)
        check(status, last_line(text), f"copying to {self.address}")

    def _shell(self, script: str, timeout: float) -> tuple[int, str]:
        # The login shell may be any; the script is for sh.
        command = [*self._ssh, "--", self._destination, f"sh -c {shlex.quote(script)}"]
        return call(command, timeout=timeout, what=self.address)
