"""An Android device reached by the system's adb, with its server and keys; never interactively."""

from __future__ import annotations

import contextlib
import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from robx.errors import DeviceError
from robx.runtime.bench.staging import check, folder_in, last_line, pulled, push_new
from robx.runtime.bench.subprocesses import call

CONNECT_SECONDS = 15
_RECONNECT_SECONDS = 5
_COPY_SECONDS = 600
_ENDED = re.compile(r"^robx-exit (\d+)\s*\Z", re.MULTILINE)
_NETWORK = re.compile(r".+:\d+\Z")  # a serial number that adb must connect to first
# What adb says when a command did not begin, for the device or the server was gone.
_GONE = re.compile(
    r"^(?:adb: |error: )+(?:device .*not found|device offline|no devices|closed|cannot connect to daemon)", re.MULTILINE
)
# What adb says, and what to do about it.
_REMEDIES = (
    ("unauthorized", "the device does not trust this computer: unlock it and accept the dialog about USB debugging"),
    ("failed to authenticate", "the device does not trust this computer: unlock it and accept the dialog on it"),
    ("no devices/emulators found", "no device is connected: enable USB debugging on it, or give adb://HOST:PORT"),
    ("more than one device", "several devices are connected: give the serial number of one, as adb devices lists them"),
    ("device offline", "the device is offline: reconnect it, or restart its USB debugging"),
)


class AdbTransport:
    """An Android device: the one with a serial number or HOST:PORT, or the only one."""

    kind = "adb"

    def __init__(self, address: str, serial: str | None) -> None:
        self.address, self._serial, self._root = address, serial, ""
        self._adb = ["adb", *(("-s", serial) if serial else ())]
        self._sent: set[str] = set()

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        """One adb push of what the device does not have yet, and one script that links it."""
        push_new(files, folder, sent=self._sent, copy=self._copy, place=self._place)

    def run(self, folder: str, command: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Run a command on the device; a failure of adb raises DeviceError, that of the command is its status."""
        return self._shell(f"cd {self._root}/{shlex.quote(folder)} && {shlex.join(command)}", timeout)

    def pull(self, folder: str, name: str, into: Path) -> Path:
        """Copy one file back."""
        command = ["pull", f"{self._root}/{folder}/{name}", str(into / name)]
        status, text = self._adb_twice(command, _COPY_SECONDS)
        check(status, _said(text), f"copying {name} from {self.address}")
        return pulled(into / name, self.address)

    def __enter__(self) -> Self:
        self._connect(CONNECT_SECONDS)
        root = f"/data/local/tmp/robx-{uuid.uuid4().hex}"
        command = [*self._adb, "shell", f"mkdir -p {root} && echo {root}"]
        status, text = call(command, timeout=2 * CONNECT_SECONDS, what=self.address)
        check(status, _said(text), f"reaching {self.address}")
        self._root = folder_in(text, self.address)
        return self

    def __exit__(self, *_: object) -> None:
        # A runner that has just lost its connection may still write a file before it ends.
        remove = f"rm -rf {self._root}"
        script = f"{remove} || {{ sleep 1; {remove}; }}"
        with contextlib.suppress(DeviceError):
            self._adb_twice(["shell", script], 2 * CONNECT_SECONDS)

    def _copy(self, folder: Path) -> None:
        status, text = self._adb_twice(["push", str(folder), f"{self._root}/"], _COPY_SECONDS)
        check(status, _said(text), f"copying to {self.address}")

    def _place(self, script: str) -> None:
        status, text = self._shell(f"cd {self._root} && sh {script}", _COPY_SECONDS)
        check(status, last_line(text), f"copying to {self.address}")

    def _shell(self, script: str, timeout: float) -> tuple[int, str]:
        """Run a script once; its exit status and output.

        When the connection is lost, adb shell ends with status 0, and before Android 7 always: the script says its own
        status.
        """
        whole = f"({script}); printf '\\nrobx-exit %d\\n' $?"
        _, text = self._adb_twice(["shell", whole], timeout)
        ended = _ENDED.search(text)
        if ended is None:
            raise DeviceError(f"the connection to {self.address} was lost: {_said(text) or 'adb shell ended early'}")
        return int(ended[1]), text[: ended.start()].strip()

    def _adb_twice(self, arguments: list[str], timeout: float) -> tuple[int, str]:
        """Run an adb command; once more, after reconnecting, if the device was gone before it began."""
        status, text = call([*self._adb, *arguments], timeout=timeout, what=self.address)
        if status and _GONE.search(text):
            with contextlib.suppress(DeviceError):
                self._connect(_RECONNECT_SECONDS)
                call([*self._adb, "wait-for-device"], timeout=_RECONNECT_SECONDS, what=self.address)
            status, text = call([*self._adb, *arguments], timeout=timeout, what=self.address)
        return status, text

    def _connect(self, timeout: float) -> None:
        """Make the adb server connect to a network address; it reaches other devices by itself."""
        if self._serial and _NETWORK.match(self._serial):
            status, text = call(["adb", "connect", self._serial], timeout=timeout, what=self.address)
            if status or "connected to" not in text:  # adb connect may fail with status 0
                check(1, _said(text), f"reaching {self.address}")


def _said(text: str) -> str:
    """What adb said about a failure, in one line: a known one with its remedy, else its first line of an error."""
    for sign, remedy in _REMEDIES:
        if sign in text:
            return remedy
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("* ")]
    errors = [line for line in lines if re.match(r"(adb: |error: )", line)]
    return re.sub(r"\A(adb: |error: )+", "", (errors or lines[-1:] or [""])[0])[:300]
