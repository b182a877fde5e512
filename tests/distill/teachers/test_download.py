"""Downloads against a real server on the loopback: resume, hash, faults, and processes that want the same file."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from robx.distill.teachers.download import fetch
from robx.errors import ArtifactError, InputError

DATA = bytes(range(256)) * 20_000  # 5 MB
SHA = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` under any path, with ranges; `break_after` cuts the connection once after so many bytes."""

    daemon_threads = True
    data = DATA
    tag = '"one"'
    ranges = True
    break_after: list[int]
    seen: list[tuple[str | None, int]]  # (Range header, status)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/dir/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        if self.path.endswith("missing.pth"):
            self.send_error(404)
            return
        start = 0
        if asked and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(re.match(r"bytes=(\d+)-", asked).group(1))  # type: ignore[union-attr]
        if start >= len(server.data):
            server.seen.append((asked, 416))
            self.send_error(416)
            return
        body = server.data[start:]
        server.seen.append((asked, 206 if start else 200))
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        self.end_headers()
        if server.break_after:
            body = body[: server.break_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.seen, found.break_after = [], []
    thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_downloaded_once_with_progress(server: Server, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    path = fetch(server.url, tmp_path, sha256=SHA, progress=lambda *step: steps.append(step))
    assert path.read_bytes() == DATA
    assert steps[-1] == (len(DATA), len(DATA), "weights.pth")
    assert [done for done, _, _ in steps] == sorted({done for done, _, _ in steps})
    assert fetch(server.url, tmp_path, sha256=SHA) == path
    assert len(server.seen) == 1
    assert files(tmp_path) == {"weights.pth", "weights.pth.sha256"}


def test_a_broken_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_500_000, 1_000_000]
    assert fetch(server.url, tmp_path, sha256=SHA).read_bytes() == DATA
    assert [status for _, status in server.seen] == [200, 206, 206]
    starts = [int(asked.split("=")[1].rstrip("-")) for asked, _ in server.seen[1:] if asked]
    assert 0 < starts[0] <= 1_500_000 < starts[1] <= 2_500_000


def test_without_hard_links_the_file_is_copied(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    assert fetch(server.url, tmp_path, sha256=SHA).read_bytes() == DATA
    assert files(tmp_path) == {"weights.pth", "weights.pth.sha256"}


def test_a_later_run_resumes_the_download(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_000_000, 1_000_000, 1_000_000]
    with pytest.raises(InputError, match="run the same command again"):
        fetch(server.url, tmp_path, sha256=SHA)
    assert not (tmp_path / "weights.pth").exists()
    assert fetch(server.url, tmp_path, sha256=SHA).read_bytes() == DATA
    assert server.seen[-1][1] == 206


def test_a_file_that_changed_on_its_host_is_restarted(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_000_000] * 3
    with pytest.raises(InputError):
        fetch(server.url, tmp_path)
    server.data, server.tag = DATA[::-1], '"two"'
    assert fetch(server.url, tmp_path).read_bytes() == DATA[::-1]
    assert server.seen[-1][1] == 200


def test_a_server_without_ranges_is_restarted(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.break_after = [1_000_000]
    assert fetch(server.url, tmp_path, sha256=SHA).read_bytes() == DATA
    assert [status for _, status in server.seen] == [200, 200]


def test_a_partial_file_that_is_too_long_is_restarted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(DATA + b"more")
    (tmp_path / "weights.pth.part.tag").write_text(server.tag)
    assert fetch(server.url, tmp_path, sha256=SHA).read_bytes() == DATA
    assert [status for _, status in server.seen] == [416, 200]


def test_a_wrong_hash_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not the file that was expected"):
        fetch(server.url, tmp_path, sha256="0" * 64)
    assert "weights.pth" not in files(tmp_path)
    assert "weights.pth.part" not in files(tmp_path)


def test_a_cached_file_that_changed_is_noticed(server: Server, tmp_path: Path) -> None:
    path = fetch(server.url, tmp_path)
    path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"weights\.pth has changed since it was downloaded"):
        fetch(server.url, tmp_path)


def test_no_such_file_and_no_network_are_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HTTP 404") as error:
        fetch(server.url.replace("weights", "missing"), tmp_path, hint="give it with --teacher-weights FILE")
    assert "--teacher-weights FILE" in str(error.value)
    with socket.socket() as unused:  # bound and not listening: refused at once
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/weights.pth"
        with pytest.raises(InputError, match="--teacher-weights FILE") as error:
            fetch(url, tmp_path, hint="give it with --teacher-weights FILE")
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def test_two_processes_download_it_once(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from robx.distill.teachers.download import fetch;"
        " fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)]) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert (tmp_path / "weights.pth").read_bytes() == DATA
    assert [status for _, status in server.seen] == [200]


def test_no_permission_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError):
        fetch(server.url, tmp_path / "file" / "cache")
