"""Python processes that start at once: forks of a server process that has imported torch, timm and robx.

`Preloaded().start([script, ...])` is `subprocess.Popen([sys.executable, script, ...])` without the five seconds that
the imports take. Each is a process of its own, with its own environment, folder, signals and exit status.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_MESSAGE = 200_000  # bytes of a request: its arguments and environment


class Process:
    """A started process, with the methods of subprocess.Popen that the tests use; its streams are pipes of text."""

    def __init__(self, pid: int, report: IO[bytes], streams: Sequence[IO[str]]) -> None:
        self.pid, self.returncode = pid, None  # type: tuple[int, int | None]
        self.stdin, self.stdout, self.stderr = streams
        self._report = report

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes to stdout and stderr."""
        said = {}

        def read(stream: IO[str]) -> None:
            said[stream] = stream.read()

        self.stdin.close()
        readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in (self.stdout, self.stderr)]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return said[self.stdout], said[self.stderr]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            self.returncode = int(self._report.readline())
            self._report.close()
        return self.returncode


class Preloaded:
    """The server, which imports everything when it is first asked for a process."""

    def __init__(self) -> None:
        self._requests: socket.socket | None = None

    def start(
        self, arguments: Sequence[object], *, env: Mapping[str, str] | None = None, new_session: bool = False
    ) -> Process:
        """Start [script, ...], ["-c", code, ...] or ["-m", module, ...]."""
        if self._requests is None:
            self._requests, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other:
                command = [sys.executable, __file__, str(other.fileno())]
                subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        pipes = {name: os.pipe() for name in ("report", "stdin", "stdout", "stderr")}
        theirs = [pipes[name][0 if name == "stdin" else 1] for name in pipes]
        mine = [pipes[name][1 if name == "stdin" else 0] for name in pipes]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "env": dict(os.environ if env is None else env),
            "folder": str(Path.cwd()),
            "new_session": new_session,
        }
        socket.send_fds(self._requests, [json.dumps(request).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        report = os.fdopen(mine[0], "rb", buffering=0)  # so that what is left to read is seen by select
        streams = [os.fdopen(one, mode) for one, mode in zip(mine[1:], "wrr", strict=True)]
        return Process(int(report.readline()), report, streams)

    def run(self, arguments: Sequence[object], **how: Any) -> tuple[int, str, str]:
        """Run one to its end: (exit status, stdout, stderr)."""
        process = self.start(arguments, **how)
        out, errors = process.communicate(timeout=240)
        return process.wait(), out, errors

    def close(self) -> None:
        """End the server; processes that run go on."""
        if self._requests is not None:
            self._requests.close()


def _serve(requests: socket.socket) -> None:
    """Fork a process for every request; returns in that process, when it has become what was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE, 4)
        if not message:
            os._exit(0)
        if not os.fork():
            requests.close()
            return _watch(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: dict[str, Any], report: int, *streams: int) -> None:
    """Fork the process and report its number and its exit status; returns in the process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        os.write(report, f"{child}\n".encode())
        os.write(report, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.close(report)
    if request["new_session"]:
        os.setsid()
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["arguments"]
    sys.path[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]


def _become() -> None:
    """Run what sys.argv names, and end, as the python command does; but leave the memory to the kernel."""
    status = 1
    try:
        _run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # ends loader workers, among others
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _run() -> None:
    what = sys.argv[0]
    if what == "-c":
        code, *rest = sys.argv[1:]
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    # No engine: their threads would not survive a fork.
    import onnx  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401
    import torch

    import robx.cli
    import robx.distill.commands
    import robx.distill.teachers.prototypes
    import robx.distill.teachers.write_checkpoint
    import robx.distill.train  # noqa: F401

    torch.set_num_threads(1)
    sys.path.pop(0)  # this file's folder
    gc.freeze()  # a collection would write to, and so copy, every page in every fork
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        _serve(connection)
    _become()
