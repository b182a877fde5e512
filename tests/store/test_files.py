"""A reader sees the old file or the new one, whatever happens to the writer."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from robx.errors import ArtifactError, InputError
from robx.store.files import (
    cache_folder,
    read_json,
    read_user_text,
    require_space,
    sha256_file,
    stamp_of,
    write_bytes,
    write_json,
)
from robx.store.toml import read_toml


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2's own example.
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hashlib.sha256(b"abc").hexdigest() == sha256_file(tmp_path / "x")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written"), (errno.EIO, "error")]
)
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def fail(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=message):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path) -> None:
    """A real process that may write no more than 64 KiB to any file."""
    code = textwrap.dedent(
        """
        import resource, signal, sys, pathlib
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        from robx.errors import RobxError
        from robx.store.files import write_bytes
        try:
            write_bytes(pathlib.Path(sys.argv[1]), b"x" * 1_000_000)
        except RobxError as error:
            print(error)
            sys.exit(error.exit_status)
        """
    )
    path = tmp_path / "big"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no space left to write" in done.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "value"
    write_bytes(path, b"old")
    code = textwrap.dedent(
        """
        import os, sys, pathlib, signal
        import robx.store.files as files
        def die(*_): os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "write":
            write = lambda p: (p.write_bytes(b"ne"), die())
        else:
            write = lambda p: p.write_bytes(b"new")
            setattr(os, sys.argv[2], die)
        files.write_atomically(pathlib.Path(sys.argv[1]), write)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), moment])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a guessed name: a new file is made, and never through a link."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0a1b2c3d")
    (tmp_path / ".value.robx-0a1b2c3d.tmp").symlink_to(victim)
    with pytest.raises(InputError, match="cannot be written"):
        write_bytes(tmp_path / "value", b"new")
    assert victim.read_text() == "precious" and not (tmp_path / "value").exists()


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "value").symlink_to("target")
    write_bytes(tmp_path / "value", b"new")
    assert (tmp_path / "target").read_text() == "precious" and (tmp_path / "value").read_bytes() == b"new"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_garbage_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_huge_json_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ArtifactError, match="is larger than"):
        read_json(tmp_path / "x.json")


def test_too_little_space_is_reported_in_advance(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(InputError, match="are needed: free some space"):
        require_space(tmp_path, 2**62)


def test_a_stamp_notices_a_rewritten_file_and_asks_for_a_sample_of_very_many(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).write_text("same length")
    before = stamp_of(4, lambda at: tmp_path / str(at))  # one is missing
    assert before == stamp_of(4, lambda at: tmp_path / str(at))
    (tmp_path / "1").write_text("SAME LENGTH")
    os.utime(tmp_path / "1", (1, 1))
    assert stamp_of(4, lambda at: tmp_path / str(at)) != before
    asked: list[int] = []
    stamp_of(20_000, lambda at: tmp_path / str(asked.append(at)))
    assert asked == list(range(20_000))
    asked.clear()
    stamp_of(1_281_167, lambda at: tmp_path / str(asked.append(at)))
    assert len(set(asked)) == 4096 and asked[0] == 0 and asked[-1] > 1_280_000 and asked == sorted(asked)


def test_the_location_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("ROBX_CACHE")
    assert cache_folder() == tmp_path / "user" / "robx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "robx"


def test_a_byte_order_mark_is_no_part_of_a_users_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("name = 'ä'\n", encoding="utf-8-sig")
    assert read_toml(tmp_path / "a.toml", what="a plan") == {"name": "ä"}
    assert read_user_text(tmp_path / "a.toml") == "name = 'ä'\n"
