"""An Android device for the real adb client: a small adbd that speaks ADB's wire protocol on the loopback interface.

It runs each command with sh on this machine. The path /data/local/tmp, in commands, file names and output, stands for a
folder here, and getprop answers from a table. Protocol: packages/modules/adb/{protocol.txt,SYNC.TXT,
OVERVIEW.TXT} of AOSP and, for shell v2 and the second version of stat and list, shell_protocol.h and
file_sync_protocol.h.

    with Adbd(folder) as device:                  # device.serial is 127.0.0.1:PORT
        subprocess.run(["adb", "connect", device.serial])

Messages are six little-endian u32 (command, two arguments, length and checksum of the data, ~command) and the data.
Each side sends one WRTE per stream and waits for its OKAY.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import select
import shlex
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

VERSION, MAX_DATA = 0x01000001, 256 * 1024
TMP = "/data/local/tmp"
FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir"
# Kinds of AUTH message, and of shell v2 packet.
TOKEN, SIGNATURE = 1, 2
STDOUT, STDERR, EXIT = 1, 2, 3
PROPERTIES = {
    "ro.build.version.release": "15",
    "ro.product.manufacturer": "Nobody",
    "ro.product.model": "Phone 1",
    "ro.soc.model": "Imagined",
    "ro.product.cpu.abi": "arm64-v8a",
}
# As Android 15 prints it, shortened.
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 83
  scale: 100
  voltage: 4213
  temperature: 314
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
	callbacks: 2
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=31.4, mType=2, mName=battery, mStatus=0}
"""


class Adbd:
    """One device; its attributes may be changed at any time."""

    def __init__(self, folder: Path, *, features: str = FEATURES, authorised: bool = True) -> None:
        self.folder = folder  # what stands for /data/local/tmp
        self.features, self.authorised = features, authorised
        self.properties = dict(PROPERTIES)
        self.dumps = {"battery": BATTERY, "thermalservice": THERMAL}  # of dumpsys
        self.capacity: int | None = None  # bytes that fit below the folder
        self.before: Callable[[str], None] = lambda service: None  # called before each service; may raise or drop
        self.path = os.environ["PATH"]  # of the commands, after Android's own tools
        self.services: list[str] = []  # that were opened: "shell,v2,raw:ls", "sync:", ...
        self.received: list[str] = []  # names of the files that were pushed
        self._connections: list[_Connection] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """Close every connection, as when a cable is pulled out; the device goes on listening."""
        for connection in self._connections:
            connection.close()

    def vanish(self) -> None:
        """Close every connection and accept no others."""
        self.__exit__()

    def here(self, text: str) -> str:
        """`text` of the host, with this machine's path of /data/local/tmp."""
        return text.replace(TMP, str(self.folder))

    def used(self) -> int:
        """Bytes below the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = _Connection(self, self._listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Connection:
    """The transport between an adb server and the device, which carries any number of streams."""

    def __init__(self, device: Adbd, peer: socket.socket) -> None:
        self.device, self._peer = device, peer
        self._file: IO[bytes] = peer.makefile("rb")
        self._sending = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._last = 0

    def serve(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                command, first, second, data = self._receive()
                self._handle(command, first, second, data)
        self.close()
        self._file.close()
        self._peer.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        for stream in list(self._streams.values()):
            stream.ended()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        header = struct.pack("<6I", number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self._sending:
            self._peer.sendall(header + data)

    def _receive(self) -> tuple[bytes, int, int, bytes]:
        number, first, second, length, _, magic = struct.unpack("<6I", _exactly(self._file, 24))
        if magic != number ^ 0xFFFFFFFF or length > MAX_DATA:
            raise ValueError("not a message of ADB")
        return number.to_bytes(4, "little"), first, second, _exactly(self._file, length)

    def _handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command == b"CNXN" and self.device.authorised:
            names = ";".join(f"{key}={value}" for key, value in self.device.properties.items())
            self.send(b"CNXN", VERSION, MAX_DATA, f"device::{names};features={self.device.features}".encode())
        elif command == b"CNXN" or (command == b"AUTH" and first == SIGNATURE):
            # A device that does not know the key refuses each signature with a new token. Its user is then shown the
            # public key (the third kind of AUTH), and this one never allows it.
            self.send(b"AUTH", TOKEN, 0, os.urandom(20))
        elif command == b"OPEN":
            self._last += 1
            opened = self._streams[self._last] = _Stream(self, self._last, first)
            threading.Thread(target=opened.serve, args=(data.rstrip(b"\0").decode(),), daemon=True).start()
        elif stream := self._streams.get(second):
            stream.incoming(command, data)


class _Stream:
    """One service in use."""

    def __init__(self, connection: _Connection, own: int, peer: int) -> None:
        self.device = connection.device
        self._connection, self._own, self._peer = connection, own, peer
        self._data: queue.Queue[bytes] = queue.Queue()
        self._buffer, self._writing = b"", threading.Lock()
        self._ready = threading.Semaphore(1)  # the last WRTE was answered
        self.closed = threading.Event()

    def incoming(self, command: bytes, data: bytes) -> None:
        if command == b"WRTE":
            self._data.put(data)
            self._connection.send(b"OKAY", self._own, self._peer)
        elif command == b"OKAY":
            self._ready.release()
        elif command == b"CLSE":
            self.ended()

    def ended(self) -> None:
        self.closed.set()
        self._data.put(b"")
        self._ready.release()

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; EOFError when the stream is closed before."""
        while len(self._buffer) < size:
            data = self._data.get()
            if self.closed.is_set() and not data:
                raise EOFError
            self._buffer += data
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_DATA):
            with self._writing:
                self._ready.acquire()
                if self.closed.is_set():
                    raise EOFError
                self._connection.send(b"WRTE", self._own, self._peer, data[start : start + MAX_DATA])

    def serve(self, service: str) -> None:
        self.device.services.append(service)
        name, _, rest = service.partition(":")
        kind, *options = name.split(",")
        with contextlib.suppress(OSError, EOFError):
            self.device.before(service)
            known = {"shell": self._shell, "exec": self._exec, "sync": lambda *_: _Sync(self).serve()}
            if kind not in known or (kind == "shell" and "v2" in options and "shell_v2" not in self.device.features):
                self._connection.send(b"CLSE", 0, self._peer)
                return
            self._connection.send(b"OKAY", self._own, self._peer)
            known[kind](rest, "v2" in options)
            self._ready.acquire()  # a stream is closed after its last WRTE was answered
        with contextlib.suppress(OSError):
            self._connection.send(b"CLSE", self._own, self._peer)

    def _exec(self, command: str, _: bool) -> None:
        self._run(command, lambda data, _: self.write(data))

    def _shell(self, command: str, packets: bool) -> None:
        if not packets:  # before Android 7: no exit status, and one stream for output and errors
            self._run(f"exec 2>&1; {command}", lambda data, _: self.write(data))
            return
        status = self._run(command, lambda data, kind: self.write(struct.pack("<BI", kind, len(data)) + data))
        self.write(struct.pack("<BIB", EXIT, 1, status))

    def _run(self, command: str, send: Callable[[bytes, int], None]) -> int:
        """Run a command as the device's shell does; returns its exit status."""
        environment = {**os.environ, "PATH": f"{self._tools()}:{self.device.path}"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            ["sh", "-c", self.device.here(command)], stdin=pipe, stdout=pipe, stderr=pipe, env=environment
        )
        assert process.stdin and process.stdout and process.stderr
        process.stdin.close()

        copiers = [
            threading.Thread(target=self._forward, args=(file, lambda data, kind=kind: send(data, kind)), daemon=True)
            for file, kind in ((process.stdout, STDOUT), (process.stderr, STDERR))
        ]
        for thread in copiers:
            thread.start()
        for thread in copiers:
            thread.join()
        status = process.wait()
        return status if status >= 0 else 128 - status

    def _forward(self, file: IO[bytes], send: Callable[[bytes], None]) -> None:
        """Send what a command prints, in whole lines; closes its pipe once the host is gone, as adbd does."""
        line, block = b"", b" "
        with file, contextlib.suppress(EOFError, OSError):
            while block and not self.closed.is_set():
                if not select.select([file], [], [], 0.05)[0]:
                    continue
                block = os.read(file.fileno(), 64 * 1024)
                end = (line + block).rfind(b"\n") + 1 if block else len(line)
                whole, line = (line + block)[:end], (line + block)[end:]
                send(whole.replace(str(self.device.folder).encode(), TMP.encode()))

    def _tools(self) -> Path:
        """A folder with the commands of Android that this machine lacks."""
        folder = self.device.folder.parent / f"{self.device.folder.name}-bin"
        folder.mkdir(exist_ok=True)
        for name, answers in (("getprop", self.device.properties), ("dumpsys", self.device.dumps)):
            cases = " ".join(f"{key}) echo {shlex.quote(value)};;" for key, value in answers.items())
            tool = folder / name
            if not tool.exists():
                tool.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
                tool.chmod(0o755)
        return folder


class _Sync:
    """The service that copies files: requests of an id, a length and a path."""

    def __init__(self, stream: _Stream) -> None:
        self._stream, self._device = stream, stream.device

    def serve(self) -> None:
        while True:
            request, length = struct.unpack("<4sI", self._stream.read(8))
            if request == b"QUIT":
                return
            name = self._stream.read(length).decode()
            try:
                self._answer(request, name)
            except OSError as error:
                self._fail(f"write failed: {os.strerror(error.errno or errno.EIO)}")

    def _answer(self, request: bytes, name: str) -> None:
        path = Path(self._device.here(name))
        if request == b"SEND":
            self._send(name)
        elif request == b"RECV":
            with path.open("rb") as file:
                while block := file.read(64 * 1024):
                    self._stream.write(struct.pack("<4sI", b"DATA", len(block)) + block)
            self._stream.write(struct.pack("<4sI", b"DONE", 0))
        elif request in (b"STAT", b"LST2", b"STA2"):
            found = _facts(path, follow=request == b"STA2")
            self._stream.write(request + (_short(found) if request == b"STAT" else _long(found)))
        elif request in (b"LIST", b"LIS2"):
            self._list(path, second=request == b"LIS2")
        else:
            raise OSError(errno.EOPNOTSUPP, "")

    def _list(self, path: Path, *, second: bool) -> None:
        for entry in sorted(path.iterdir()) if path.is_dir() else []:
            name, found = entry.name.encode(), _facts(entry, follow=False)
            fixed = b"DNT2" + _long(found) if second else b"DENT" + _short(found)
            self._stream.write(fixed + struct.pack("<I", len(name)) + name)
        self._stream.write(b"DONE" + bytes(72 if second else 16))

    def _send(self, request: str) -> None:
        name, _, mode = request.rpartition(",")
        path, content = Path(self._device.here(name)), io.BytesIO()
        while True:
            kind, length = struct.unpack("<4sI", self._stream.read(8))
            if kind == b"DONE":  # its length is the time of the last change
                break
            content.write(self._stream.read(length))
        capacity = self._device.capacity
        if capacity is not None and self._device.used() + content.tell() > capacity:
            raise OSError(errno.ENOSPC, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
        path.chmod(stat.S_IMODE(int(mode)))
        self._device.received.append(path.name)
        self._stream.write(struct.pack("<4sI", b"OKAY", 0))

    def _fail(self, why: str) -> None:
        self._stream.write(struct.pack("<4sI", b"FAIL", len(why)) + why.encode())


def _facts(path: Path, *, follow: bool) -> os.stat_result | None:
    try:
        return path.stat() if follow else path.lstat()
    except OSError:
        return None


def _short(found: os.stat_result | None) -> bytes:
    """Mode, size, time of the last change: u32."""
    return struct.pack("<3I", found.st_mode, found.st_size, int(found.st_mtime)) if found else bytes(12)


def _long(found: os.stat_result | None) -> bytes:
    """Error, device, inode, mode, links, owner, group, size and three times."""
    if found is None:
        return struct.pack("<I", errno.ENOENT) + bytes(64)
    numbers = (found.st_dev, found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size)
    return struct.pack("<IQQ4IQ3q", 0, *numbers, int(found.st_atime), int(found.st_mtime), int(found.st_ctime))


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data
