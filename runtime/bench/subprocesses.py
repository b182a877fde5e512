"""Running another program: no terminal, no question asked, no more of its time, output or files than is allowed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from robx.errors import DeviceError

_MOST_BYTES = 2_000_000_000  # that a command may print, or copy back
_TAIL_BYTES = 65536  # of what it printed, that is read


def call(command: list[str], *, timeout: float, what: str, cwd: Path | None = None) -> tuple[int, str]:
    """Run a command without a terminal; its status and the tail of what it said, output before errors.

    What it says goes to files that the kernel keeps from growing without end, and the files that it copies back too.

    Raises:
        DeviceError: it cannot be started, does not end within `timeout` seconds, or writes too much.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                timeout=timeout,
                cwd=cwd,
                preexec_fn=None if cwd else _bound_files,
            )
        except FileNotFoundError:
            raise DeviceError(f"{what} needs the command {command[0]!r}: install it, or put it on PATH") from None
        except OSError as error:
            raise DeviceError(f"{what} cannot run {command[0]!r} ({error.strerror}): give another command") from error
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{what} did not answer within {timeout:.0f} s") from None
        text = "\n".join(part for part in map(_tail, (errors, output)) if part)
        if done.returncode == -signal.SIGXFSZ:
            raise DeviceError(f"{what} sent more than {_MOST_BYTES / 1e9:.0f} GB, and no runner does: it was stopped")
        return done.returncode, text


def _bound_files() -> None:
    """In the child, before it becomes the command; the user's own limit may be lower already."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    most = _MOST_BYTES if hard == resource.RLIM_INFINITY else min(_MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return file.read().decode(errors="replace").strip()
