"""Which program measures on a device: the Python runner, or the native one where there is no Python."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robx.errors import InputError
from robx.records import Bundle
from robx.runtime.bench import native_runner, runner_zip
from robx.runtime.bench.transports import Transport

RUNNERS = ("python", "native")
_PROBE_SECONDS = 30
_PROBE = (
    'printf "robx-device %s|%s|%s\\n" "$(uname -m)" "$(getprop ro.product.cpu.abi 2> /dev/null)" '
    '"$(command -v python3)"'
)
_ANSWER = re.compile(r"^robx-device ([^|\n]*)\|([^|\n]*)\|([^|\n]*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A runner and how it is started in a job's folder on the device."""

    kind: Literal["python", "native"]
    command: tuple[str, ...]
    abi: str = ""  # of a native runner

    def files(self, bundle: Bundle | None, here: Path) -> dict[str, Path]:
        """The files of the runner that `bundle` needs, by name; without one it can only describe the device.

        Args:
            bundle: what is measured.
            here: a local folder for files that are made.

        Raises:
            InputError: the native runner was not built, or not with the bundle's runtime.
        """
        if self.kind == "native":
            return native_runner.native_files(self.abi, bundle.runtime if bundle else None)
        path = here / runner_zip.NAME
        path.write_bytes(runner_zip.pack_runner(bundle))
        return {runner_zip.NAME: path}

    def facts(self, bundle: Bundle) -> dict[str, Any]:
        """The record's entries about the runner."""
        if self.kind == "native":
            return {"runner": "native", **native_runner.facts_of(self.abi, bundle.runtime)}
        return {"runner": "python", "runner_sha256": runner_zip.runner_sha256(bundle)}


def python_command(python: str | None) -> list[str]:
    """The words of a Python command, split as a shell does; empty for None.

    Raises:
        InputError: its quotes are not closed.
    """
    try:
        return shlex.split(python or "")
    except ValueError as error:
        raise InputError(f"--python {python!r} is not a command ({error}): close its quotes") from error


def choose_runner(transport: Transport, *, wanted: str | None = None, python: str | None = None) -> Runner:
    """The runner for a device.

    Args:
        transport: the open connection to the device.
        wanted: "python" or "native"; None: Python where the device has one, else native.
        python: the Python command on the device; None: this Python locally, ``python3`` elsewhere.

    Raises:
        InputError: the runner is unknown, or a native one is needed and there is none for the device.
        DeviceError: the device cannot be reached.
    """
    if wanted not in (None, *RUNNERS):
        raise InputError(f"unknown runner {wanted!r}: choose one of {', '.join(RUNNERS)}")
    if wanted == "native" and python:
        raise InputError("--python has no effect with --runner native: leave out one of them")
    local = transport.kind == "local"
    by_python = Runner(
        kind="python", command=(*(python_command(python) or [sys.executable if local else "python3"]), runner_zip.NAME)
    )
    if wanted == "python" or python or (local and wanted is None):
        return by_python
    _, text = transport.run(".", ["sh", "-c", _PROBE], timeout=_PROBE_SECONDS)
    answer = _ANSWER.search(text)
    machine, android, found = answer.groups() if answer else ("", "", "python3")
    if wanted is None and found:
        return by_python
    try:
        abi = native_runner.device_abi(machine, android)
        native_runner.read_build(abi)
    except InputError as error:
        if wanted == "native":
            raise
        raise InputError(f"{transport.address} has no python3, and {error}, or name a Python with --python") from None
    return Runner(kind="native", command=(f"./{native_runner.NAME}",), abi=abi)


def job_hashes(runner: Runner, files: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of the native runner's libraries, which it verifies as it does the bundle's files."""
    if runner.kind == "python":
        return {}
    build = native_runner.read_build(runner.abi)
    return {lib["file"]: lib["sha256"] for lib in build["libraries"] if lib["file"] in files}
