"""A folder appears complete or not at all, and has one owner; leftovers of killed processes are removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from robx.errors import InputError, NoSpace
from robx.store import folders
from robx.store.files import write_bytes
from robx.store.folders import new_folder, remove_leftovers, require_replaceable, require_writable, scratch_folder
from robx.store.locks import lock_folder, turn, wait_for

NAMES = ("bundle", "odd name.5", "x*[a]", "-rf\n'$(id)'", "é" * 60)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "import os, pathlib, sys\nimport robx.store.folders as f\nfrom robx.store.locks import lock_folder\n"
        + textwrap.dedent(code),
    ]
    return subprocess.Popen([*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["one step", "two steps"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2 and, as on systems other than Linux, without."""
    if request.param == "two steps":
        monkeypatch.setattr(folders, "_exchange", lambda one, two: False)
    return str(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path, swap: str, name: str) -> None:
    target = tmp_path / name
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(target, ours=("a",)) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert contents(target) == {"a": "1"}
    with new_folder(target, ours=("a",)) as folder:
        (folder / "b").write_text("3")
    assert contents(target) == {"b": "3"}
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda one, two: False)
    target, real = tmp_path / "bundle", os.replace
    with new_folder(target) as folder:
        (folder / "a").write_text("1")

    def fail(source: Path, place: Path) -> None:
        if Path(place) == target and source.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, place)

    monkeypatch.setattr(os, "replace", fail)
    with (
        pytest.raises(InputError, match="cannot be written: Input/output error"),
        new_folder(target, ours=("a",)) as folder,
    ):
        (folder / "a").write_text("2")
    assert contents(target) == {"a": "1"} and [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_file_of_that_name_and_a_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file cannot be written"), new_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"a": "1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "real"]


@pytest.mark.parametrize("check", [require_writable, require_replaceable])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what happens there, not by permissions: root has them all."""
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    for place in (tmp_path / "new", tmp_path / "a" / "b", tmp_path / "old"):
        check(place, remedy="move")
    for place in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(InputError, match=r"/file is not a folder: move$"):
            check(place, remedy="move")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "old"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", _fails_with(errno.EROFS))
        with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\): move$"):
            check(tmp_path / "new", remedy="move")
        patched.setattr(Path, "mkdir", _fails_with(errno.ENOSPC))
        with pytest.raises(NoSpace, match="no space left"):
            check(tmp_path / "new", remedy="move")


def _fails_with(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_mount_point_is_not_replaced_and_nothing_is_made_in_proc() -> None:
    with pytest.raises(InputError, match=r"^/proc is a mount point"):
        require_replaceable(Path("/proc"), remedy="move")
    with pytest.raises(InputError, match=r"^/proc (cannot be written|is read-only).*: move$"):
        require_replaceable(Path("/proc/robx"), remedy="move")


def test_every_file_is_flushed_before_the_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def replace(source: Path, place: Path) -> None:
        synced.append("renamed")
        real_replace(source, place)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with new_folder(tmp_path / "bundle") as folder:
        (folder / "package").mkdir()
        (folder / "package" / "weights").write_text("1")
    before, after = synced[: synced.index("renamed")], synced[synced.index("renamed") + 1 :]
    assert {"weights", "package", folder.name} <= set(before) and after == [tmp_path.name]


def test_concurrent_writers_each_write_a_complete_folder(tmp_path: Path) -> None:
    code = """
    for turn in range(20):
        with f.new_folder(pathlib.Path(sys.argv[1]), ours="abc") as folder:
            for name in "abc":
                (folder / name).write_text(sys.argv[2])
    """
    writers = [start(code, tmp_path / "bundle", n) for n in range(3)]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "bundle").exists():
            descriptor = os.open(tmp_path / "bundle", os.O_RDONLY)  # stays with the folder that it opened
            try:
                read = {name: Path(f"/proc/self/fd/{descriptor}/{name}").read_text() for name in "abc"}
                assert len(set(read.values())) == 1
            except FileNotFoundError:  # it was replaced and removed meanwhile
                pass
            finally:
                os.close(descriptor)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.communicate()
    assert len(set(contents(tmp_path / "bundle").values())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_leftovers_of_killed_processes_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    code = """
    with f.scratch_folder(pathlib.Path(sys.argv[1]), "work") as folder:
        (folder / "big").write_text("x")
        print(folder.name, flush=True)
        sys.stdin.read()
    """
    dead, live = start(code, tmp_path), start(code, tmp_path)
    assert dead.stdout is not None and live.stdout is not None
    left, kept = dead.stdout.readline().strip(), live.stdout.readline().strip()
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    (tmp_path / ".work.notes").mkdir()  # somebody else's
    with scratch_folder(tmp_path, "work") as folder:
        assert {p.name for p in tmp_path.iterdir()} == {kept, ".work.notes", folder.name}
    assert left != kept
    live.communicate("")
    assert [p.name for p in tmp_path.iterdir()] == [".work.notes"]


def test_only_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    code = """
    import signal
    from robx.store.files import write_atomically
    def write(path):
        path.write_text("half")
        print(path.name, flush=True)
        sys.stdin.read()
    write_atomically(pathlib.Path(sys.argv[1]) / "state.json", write)
    """
    dead, live = start(code, tmp_path), start(code, tmp_path)
    assert dead.stdout is not None and live.stdout is not None
    left, kept = dead.stdout.readline().strip(), live.stdout.readline().strip()
    dead.kill()
    dead.communicate()
    others = {".notes.tmp", ".state.json.4711.tmp", ".work.abcdefgh.tmp", "x.robx-0a1b2c3d.tmp", ".robx-0a1b2c3d.tmp"}
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("mine")
    (tmp_path / ".link.robx-0a1b2c3d.tmp").symlink_to("real")
    os.mkfifo(tmp_path / ".pipe.robx-0a1b2c3d.tmp")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == others | {kept, "real", ".link.robx-0a1b2c3d.tmp"}
    assert left != kept and (tmp_path / "real" / "x").read_text() == "mine"
    live.communicate("")
    assert contents(tmp_path / "real") and (tmp_path / "state.json").read_text() == "half"


def test_a_folder_whose_replacement_was_interrupted_is_put_back(tmp_path: Path) -> None:
    """Without an atomic exchange the old folder has another name for a moment; dying there loses nothing."""
    (tmp_path / ".bundle.robx-0a1b2c3d.old").mkdir()
    (tmp_path / ".bundle.robx-0a1b2c3d.old" / "notes").write_text("mine")
    (tmp_path / ".other.robx-0a1b2c3d.old").mkdir()
    (tmp_path / "other").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "other"]
    assert contents(tmp_path / "bundle") == {"notes": "mine"}


def test_a_scratch_folder_that_disappears_meanwhile_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".work.robx-0a1b2c3d.tmp").mkdir()
    real = os.open

    def gone(path: object, *more: int, **options: object) -> int:
        if str(path).endswith(".work.robx-0a1b2c3d.tmp"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", gone)
    with scratch_folder(tmp_path, "work") as folder:
        assert folder.is_dir()


@pytest.mark.parametrize("links", [True, False])
def test_a_replaced_folder_keeps_the_files_that_robx_did_not_write(
    tmp_path: Path, swap: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:  # a file system without hard links
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(PermissionError(1, "no links")))
    target = tmp_path / "bundle"
    ours = ["manifest.json", "model.onnx", "package/weights.bin"]
    for name in (*ours, "notes.txt", "measurements.jsonl", "package/photo.jpg", "mine/deep/x", ".hidden"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"old {name}")
    (target / "link").symlink_to("/nowhere")
    (target / "empty").mkdir()
    with new_folder(target, ours=ours) as folder:
        (folder / "manifest.json").write_text("new")
    files = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}
    kept = ("notes.txt", "measurements.jsonl", "package/photo.jpg", "mine/deep/x", ".hidden")
    assert files == {"manifest.json": "new"} | {name: f"old {name}" for name in kept}
    assert (target / "link").readlink() == Path("/nowhere") and (target / "empty").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("mine", ["model.onnx", "package/weights.bin", "package"])
def test_a_file_that_robx_did_not_write_is_never_replaced(tmp_path: Path, mine: str) -> None:
    target = tmp_path / "bundle"
    (target / mine).parent.mkdir(parents=True)
    (target / mine).write_text("mine")
    with pytest.raises(InputError, match=f"{mine} was not written by robx"), new_folder(target) as folder:
        (folder / "package").mkdir()
        (folder / "package" / "weights.bin").write_text("new")
        (folder / "model.onnx").write_text("new")
    assert (target / mine).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_new_folders_and_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        with new_folder(tmp_path / "bundle") as folder:
            write_bytes(folder / "a", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "bundle" / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["link", "dangling link", "notes", "pipe", "folder"])
@pytest.mark.parametrize("lock", [lock_folder, lambda folder: wait_for(folder / "made")], ids=["folder", "file"])
def test_a_lock_file_that_is_not_robxs_is_left_alone(tmp_path: Path, kind: str, lock: Any) -> None:
    (tmp_path / "work").mkdir()
    for name in (".lock", ".made.lock"):
        path = tmp_path / "work" / name
        if "link" in kind:
            path.symlink_to(tmp_path / "victim")
        elif kind == "notes":
            path.write_text("my notes, which are not a process id")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    if kind == "link":
        (tmp_path / "victim").write_text("precious")
    with (
        pytest.raises(InputError, match=r"\.lock (is a link|is not a lock)|cannot be written"),
        lock(tmp_path / "work"),
    ):
        pass
    assert (tmp_path / "victim").exists() == (kind == "link")
    if kind == "link":
        assert (tmp_path / "victim").read_text() == "precious"
    if kind == "notes":
        assert path.read_text() == "my notes, which are not a process id"


def test_a_folder_has_one_owner_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    holder = start(
        "with lock_folder(pathlib.Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()", tmp_path
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {holder.pid}"), lock_folder(tmp_path):
            pass
        holder.kill()
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_workers_of_a_killed_owner_are_waited_for(tmp_path: Path) -> None:
    code = """
    import signal, time
    with lock_folder(pathlib.Path(sys.argv[1])):
        if not os.fork():  # a worker that notices late that its parent is gone
            time.sleep(1.5)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    holder = start(code, tmp_path)
    assert holder.wait() == -signal.SIGKILL
    with lock_folder(tmp_path):
        pass
    holder.communicate()


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(InputError, match=r"cannot be locked \(No locks available\)"), lock_folder(tmp_path):
        pass
    with turn(tmp_path), wait_for(tmp_path / "made"):  # for these the last one wins, as without
        pass


def test_one_turn_after_another(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(50):
            with turn(tmp_path):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "200"
    with pytest.raises(InputError, match="cannot be written"), turn(tmp_path / "none"):
        pass
