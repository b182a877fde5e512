"""robx removes and replaces only what it recorded as its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from robx.errors import InputError
from robx.store.written import RECORD, Written


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def test_only_recorded_files_are_removed(tmp_path: Path) -> None:
    ours = ("student.json", "checkpoints/step-1/state.json", "checkpoints/step-2/state.json")
    Written(tmp_path).claim(*ours)
    write(tmp_path, *ours, "notes.txt", "checkpoints/mine.txt", "checkpoints/step-2/mine.txt", ".hidden.tmp")
    found = Written(tmp_path)  # as the next process reads it
    assert list(found) == list(ours) and "checkpoints" in found and "checkpoints/step-1" in found
    assert "notes.txt" not in found and "checkpoints/mine.txt" not in found
    found.remove("checkpoints", "student.json")
    mine = {"notes.txt", "checkpoints/mine.txt", "checkpoints/step-2/mine.txt", ".hidden.tmp"}
    assert names(tmp_path) == mine | {RECORD} and not list(Written(tmp_path))
    write(tmp_path, "student.json")  # a user's own, now
    with pytest.raises(InputError, match="was not written by robx"):
        Written(tmp_path).claim("student.json")
    assert not (tmp_path / "checkpoints" / "step-1").exists()


def test_a_name_is_not_a_prefix_of_another(tmp_path: Path) -> None:
    Written(tmp_path).claim("a/x", "ab/x", "a.txt")
    write(tmp_path, "a/x", "ab/x", "a.txt")
    Written(tmp_path).remove("a")
    assert names(tmp_path) == {"ab/x", "a.txt", RECORD}


def test_somebody_elses_file_is_refused_by_name_and_nothing_is_recorded(tmp_path: Path) -> None:
    write(tmp_path, "teacher.pth")
    with pytest.raises(InputError, match=r"teacher\.pth was not written by robx.*move it away"):
        Written(tmp_path).claim("student.json", "teacher.pth")
    assert not list(Written(tmp_path)) and names(tmp_path) == {"teacher.pth"}
    (tmp_path / "student.json").symlink_to("nowhere")
    with pytest.raises(InputError, match="was not written by robx"):
        Written(tmp_path).claim("student.json")


def test_a_linked_folder_is_not_followed_and_nothing_is_removed(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    Written(run).claim("student.json", "checkpoints/step-1/state.json")
    write(run, "student.json", "checkpoints/step-1/state.json")
    (run / "checkpoints").rename(other)
    (run / "checkpoints").symlink_to(other)
    with pytest.raises(InputError, match="checkpoints is a link"):
        Written(run).remove("student.json", "checkpoints")
    assert (run / "student.json").exists() and names(other) == {"step-1/state.json"}


def test_a_linked_file_loses_its_name_and_not_its_target(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Written(run).claim("student.json")
    write(tmp_path, "mine.json")
    (run / "student.json").symlink_to("../mine.json")
    Written(run).remove("student.json")
    assert (tmp_path / "mine.json").read_text() == "mine.json" and names(run) == {RECORD}


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b"])
def test_nothing_outside_is_recorded(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="outside of"):
        Written(tmp_path).adopt(name)


def test_a_record_that_is_cut_or_odd_keeps_its_whole_lines(tmp_path: Path) -> None:
    Written(tmp_path).claim("a", "b")
    with (tmp_path / RECORD).open("a") as file:
        file.write('[1]\n"half')
    Written(tmp_path).claim("c\nd", "é")
    assert list(Written(tmp_path)) == ["a", "b", "c\nd", "é"]


def test_a_record_that_is_a_link_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECORD).symlink_to("../mine")
    with pytest.raises(InputError, match="is a link"):
        Written(tmp_path / "run")
