"""Run another program without a terminal, with limits on its time, output and files."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from robx.errors import DeviceError

_MOST_BYTES = 2_000_000_000  # limit for a command's output, and for each file that it copies back
_TAIL_BYTES = 65536  # of its output that are read


def call(command: list[str], *, timeout: float, what: str, cwd: Path | None = None) -> tuple[int, str]:
    """Run a command without a terminal; returns its status and the end of its errors and output.

    Its output goes to files whose size the kernel limits, as that of the files that it copies back.

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
            raise DeviceError(f"{what} cannot run {command[0]!r} ({error.strerror}): use another command") from error
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{what} did not answer within {timeout:.0f} s") from None
        text = "\n".join(part for part in map(_tail, (errors, output)) if part)
        if done.returncode == -signal.SIGXFSZ:
            raise DeviceError(f"{what} sent more than {_MOST_BYTES / 1e9:.0f} GB, which no runner does: it was stopped")
        return done.returncode, text


def _bound_files() -> None:
    """Limit the size of files, in the child process; the user's own limit may be lower already."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    most = _MOST_BYTES if hard == resource.RLIM_INFINITY else min(_MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return file.read().decode(errors="replace").strip()
