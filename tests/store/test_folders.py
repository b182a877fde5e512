"""A folder appears whole or not at all, and has one owner; what killed processes leave is removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from robx.errors import InputError
from robx.store import folders
from robx.store.folders import lock_folder, new_folder, remove_abandoned, scratch_folder, turn, wait_for

NAMES = ("bundle", "odd name.5", "x*[a]", "-rf\n'$(id)'", "é" * 60)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "import os, pathlib, sys\nimport robx.store.folders as f\n" + textwrap.dedent(code),
    ]
    return subprocess.Popen([*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["one step", "two steps"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2 and, as elsewhere than on Linux, without."""
    if request.param == "two steps":
        monkeypatch.setattr(folders, "_exchange", lambda one, two: False)
    return str(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path, swap: str, name: str) -> None:
    target = tmp_path / name
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert contents(target) == {"a": "1"}
    with new_folder(target) as folder:
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
    with pytest.raises(InputError, match="cannot be written: Input/output error"), new_folder(target) as folder:
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


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_writers_of_one_folder_each_put_a_whole_one_there(tmp_path: Path) -> None:
    code = """
    for turn in range(20):
        with f.new_folder(pathlib.Path(sys.argv[1])) as folder:
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


def test_what_a_killed_process_left_goes_and_what_a_live_one_has_stays(tmp_path: Path) -> None:
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


def test_what_a_live_process_writes_is_not_removed(tmp_path: Path) -> None:
    live, dead = start("sys.stdin.read()"), start("pass")
    dead.communicate()
    for process in (live.pid, dead.pid, os.getpid()):
        (tmp_path / f".state.json.{process}.tmp").write_text("half")
    (tmp_path / "real").mkdir()
    (tmp_path / ".link.abcdefgh.tmp").symlink_to("real")
    with scratch_folder(tmp_path, "work") as folder:
        for path in list(tmp_path.iterdir()):
            if path.name.endswith(".tmp"):
                remove_abandoned(path)
        assert {p.name for p in tmp_path.iterdir()} == {f".state.json.{live.pid}.tmp", "real", folder.name}
    live.communicate("")


def test_a_scratch_folder_that_goes_while_it_is_looked_at_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".work.abcdefgh.tmp").mkdir()
    real = os.open

    def gone(path: object, *more: int, **options: object) -> int:
        if str(path).endswith(".work.abcdefgh.tmp"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", gone)
    with scratch_folder(tmp_path, "work") as folder:
        assert folder.is_dir()


def test_a_folder_has_one_owner_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    holder = start(
        "with f.lock_folder(pathlib.Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()", tmp_path
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
    with f.lock_folder(pathlib.Path(sys.argv[1])):
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


def test_a_lock_that_the_file_system_has_not_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
