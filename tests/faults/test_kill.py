"""SIGKILL at any moment: the resumed run is the unbroken one, bit for bit, and leaves nothing lying about.

ROBX_SOAK=n kills n times instead of twelve; ROBX_SEED=n draws other moments.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robx.distill.training import run_checkpoint
from robx.records import load_student

KILLS = int(os.environ.get("ROBX_SOAK", "12"))
SEED = int(os.environ.get("ROBX_SEED", "0"))
RECIPE = {"epochs": 3}  # of 8 steps each
OPTIONS = {"checkpoint_steps": 2}


@pytest.fixture(scope="module")
def unbroken(server: Any, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    said = f"reading {scenes / 'train'}, without test/\ntest_vit starts from random weights\n"
    assert server.run(scenes, run, recipe=RECIPE, options=OPTIONS) == (0, said)
    return run


def assert_same_run(tiny: ModuleType, found: Path, expected: Path) -> None:
    assert tiny.losses(found) == tiny.losses(expected)
    assert (found / "student.safetensors").read_bytes() == (expected / "student.safetensors").read_bytes()
    # Optimiser, branch and counters too, and not one file more than an unbroken run leaves.
    for name in ("state.json", "state.safetensors"):
        state = (run_checkpoint.checkpoints(found)[-1] / name).read_bytes()
        assert state == (run_checkpoint.checkpoints(expected)[-1] / name).read_bytes()
    files = [sorted(p.relative_to(run).as_posix() for p in run.rglob("*")) for run in (found, expected)]
    assert files[0] == files[1]
    load_student(found)


def assert_whole(run: Path) -> int:
    """The newest checkpoint loads, none was damaged; returns its step."""
    damaged: list[str] = []
    found = run_checkpoint.load_newest(run, say=damaged.append)
    assert not damaged
    return 0 if found is None else found[0]


def test_killed_again_and_again_it_is_the_unbroken_run(
    tiny: ModuleType, server: Any, scenes: Path, tmp_path: Path, unbroken: Path
) -> None:
    draw, killed, runs = random.Random(SEED), 0, 0
    while killed < KILLS:
        run, runs = tmp_path / f"run{runs}", runs + 1
        for _ in range(6):
            done = assert_whole(run)
            if draw.random() < 0.25:
                # Calls of the whole run are counted: somewhere in one of the next few saves.
                die = {"call": draw.choice(["replace", "fsync", "open"]), "number": draw.randint(1, 40)}
            else:
                die = {"step": done + draw.randint(1, 5), "after": draw.uniform(0, 0.06)}
            status, said = server.run(scenes, run, die=die, recipe=RECIPE, options=OPTIONS)
            assert status in (0, -signal.SIGKILL), said
            killed += status != 0
        assert server.run(scenes, run, recipe=RECIPE, options=OPTIONS)[0] == 0
        assert_same_run(tiny, run, unbroken)


def test_killed_at_any_byte_of_a_checkpoint(
    tiny: ModuleType, server: Any, scenes: Path, tmp_path: Path, unbroken: Path
) -> None:
    weights = run_checkpoint.checkpoints(unbroken)[-1] / "state.safetensors"
    size, student = weights.stat().st_size, (unbroken / "student.safetensors").stat().st_size
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    record = (weights.parent / "state.json").stat().st_size
    assert record < student < size
    regions = [0, 1, 8, header // 2, header, record - 1, student - 1, (header + size) // 2, size - 1]
    draw = random.Random(SEED)
    regions += [draw.randrange(size) for _ in range(KILLS // 10)]
    run = tmp_path / "run"
    for number, limit in enumerate(regions):
        # The limit comes at the step before a save; below a file's size the kernel ends the process inside of it.
        step = 2 + 2 * (number % 2)
        before = assert_whole(run)
        die = {"step": max(before, 0) + step, "bytes": limit}
        status, said = server.run(scenes, run, die=die, recipe=RECIPE, options=OPTIONS)
        assert status == -signal.SIGXFSZ, said
        assert assert_whole(run) in (before, before + 2)
    assert server.run(scenes, run, recipe=RECIPE, options=OPTIONS)[0] == 0
    assert_same_run(tiny, run, unbroken)


def test_killed_while_a_checkpoint_is_written_in_the_background(
    tiny: ModuleType, server: Any, scenes: Path, tmp_path: Path, unbroken: Path
) -> None:
    """Training goes on beside the write; what it did since the last whole checkpoint is done again."""
    run = tmp_path / "run"
    for number, before in ((1, 0), (3, 4)):
        die = {"write": number, "after": 1.0}
        status, said = server.run(scenes, run, die=die, recipe=RECIPE, options=OPTIONS | {"checkpoint_steps": 2})
        assert status == -signal.SIGKILL, said
        assert assert_whole(run) == before
        assert tiny.losses(run)[-1][0] == before + 4  # the next save waits for this one
    assert server.run(scenes, run, recipe=RECIPE, options=OPTIONS)[0] == 0
    assert_same_run(tiny, run, unbroken)


def test_killed_in_the_midst_of_a_student_nothing_half_written_stays(server: Any, scenes: Path, tmp_path: Path) -> None:
    students, run = ["test_vit", "test_resnet"], tmp_path / "run"
    assert server.run(scenes, run, students=students)[0] == 0
    whole = sorted(p.relative_to(run).as_posix() for p in run.rglob("*"))
    for number, name in enumerate(students, start=1):
        limit = (run / name / "student.safetensors").stat().st_size - 1
        again = tmp_path / f"again{number}"
        status, said = server.run(scenes, again, students=students, die={"trunk": number, "bytes": limit})
        assert status == -signal.SIGXFSZ, said
        assert server.run(scenes, again, students=students)[0] == 0
        assert sorted(p.relative_to(again).as_posix() for p in again.rglob("*")) == whole


def test_killed_at_any_rename_it_ends_with_all_that_it_owes(server: Any, scenes: Path, tmp_path: Path) -> None:
    def owed(folder: Path) -> dict[str, bytes]:
        names = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "metrics.jsonl")]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}

    settings = {"recipe": {"epochs": 2, "batch_size": 32}, "options": {"checkpoint_steps": 2}}
    whole = tmp_path / "whole"
    assert server.run(scenes, whole / "run", store=str(whole / "targets"), **settings)[0] == 0
    for number in range(1, 30):
        again = tmp_path / f"again{number}"
        more = settings | {"store": str(again / "targets")}
        status, said = server.run(scenes, again / "run", die={"call": "replace", "number": number}, **more)
        if status == 0:
            assert number > 10
            return
        assert status == -signal.SIGKILL, said
        assert server.run(scenes, again / "run", **more)[0] == 0
        assert owed(again) == owed(whole)
    pytest.fail("it never stopped renaming")
