from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robx.distill.training import run_checkpoint, run_settings
from robx.distill.training.learner import seed_step
from robx.distill.training.run_folder import claim_folders
from robx.errors import ArtifactError, InputError
from robx.images.sources import open_source


def state(value: float = 1.0) -> dict[str, Any]:
    shared = torch.full((3, 2), value)
    return {
        "net": {"a": shared, "tied": shared, "scalar": torch.tensor(value, dtype=torch.float64), "n": torch.tensor(7)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        },
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "best": (4, 0.1 + 0.2),
        "none": None,
        "text": "ümlaut\n",
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected and type(found) is type(expected)


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state()), step=12)
    found = run_checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 12
    assert_same(found[1], state())
    assert {p.suffix for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        run_checkpoint.save_checkpoint(
            tmp_path, run_checkpoint.snapshot(state(step)), step=step, keep=2, best=2 if step >= 2 else None
        )
    assert [path.name[-1] for path in run_checkpoint.checkpoints(tmp_path)] == ["2", "5", "6"]


@given(
    where=st.floats(0, 1, exclude_max=True),
    name=st.sampled_from(["state.safetensors", "state.json"]),
    cut=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, where: float, name: str, cut: bool) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    run_checkpoint.save_checkpoint(run, run_checkpoint.snapshot(state(1)), step=1)
    newest = run_checkpoint.save_checkpoint(run, run_checkpoint.snapshot(state(2)), step=2)
    data = bytearray((newest / name).read_bytes())
    at = int(where * len(data))
    if cut:
        data = data[:at]
    else:
        data[at] ^= 1
    (newest / name).write_bytes(bytes(data))
    said: list[str] = []
    found = run_checkpoint.load_newest(run, say=said.append)
    assert found is not None
    if found[0] == 2:  # white space in the JSON, such as its last line break, has no meaning
        assert name == "state.json"
        assert_same(found[1], state(2))
    else:
        assert found[0] == 1 and len(said) == 1 and "trying the previous checkpoint" in said[0]
        assert_same(found[1], state(1))


def test_when_none_is_whole_it_says_so_and_no_run_is_none(tmp_path: Path) -> None:
    assert run_checkpoint.load_newest(tmp_path) is None
    (run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state()), step=1) / "state.safetensors").unlink()
    with pytest.raises(ArtifactError, match="none of its 1 checkpoints is intact"):
        run_checkpoint.load_newest(tmp_path)


def test_a_newer_schema_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(1)), step=1)
    path = run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(2)), step=2) / "state.json"
    record = json.loads(path.read_text()) | {"schema": 99}
    path.write_text(json.dumps(record))  # a flipped bit: the digest still says 1
    found = run_checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 1
    del record["digest"]
    path.write_text(json.dumps(record | {"digest": run_checkpoint._digest(record)}))
    with pytest.raises(ArtifactError, match="schema 99"):
        run_checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failing_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(1)), step=1)
    real = getattr(os, call)
    for fails_at in range(1, 14):
        calls = 0

        def fail(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:  # noqa: B023
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        monkeypatch.setattr(os, call, fail)
        try:
            run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(2)), step=2)
        except InputError:
            failed = True
        else:
            failed = False
        monkeypatch.setattr(os, call, real)
        found = run_checkpoint.load_newest(tmp_path)
        assert found is not None and found[0] in (1, 2)
        assert_same(found[1], state(found[0]))
        run_checkpoint.clean(tmp_path)
        assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
        if not failed:
            assert calls < fails_at
            break
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000002", ignore_errors=True)
    else:
        pytest.fail(f"{call} never stopped failing")


def test_too_little_space_is_met_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(1)), step=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="free some space"):
        run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(2)), step=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_too_little_space_is_met_before_the_first_step(
    tiny: ModuleType, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_source(scenes)
    tiny.tiny_run(data, tmp_path / "whole", recipe=tiny.tiny_recipe(batch_size=64))
    saved = sum(path.stat().st_size for path in tmp_path.rglob("state.safetensors"))
    asked, steps = list[int](), list[int]()
    monkeypatch.setattr(run_checkpoint, "require_space", lambda folder, needed: asked.append(needed) or _refuse(folder))
    with pytest.raises(InputError, match="free some space"):
        tiny.tiny_run(data, tmp_path / "run", progress=lambda done, *_: steps.append(done))
    assert not steps and asked == [pytest.approx(1.1 * saved, rel=0.02)]


def _refuse(folder: Path) -> None:
    raise InputError(f"{folder} is full: free some space")


def test_a_file_in_the_place_of_the_checkpoints_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="checkpoints cannot be written"):
        run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state()), step=1)


def test_a_full_file_system_is_one_clear_line(tmp_path: Path) -> None:
    import resource
    import signal

    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot({"a": torch.zeros(10)}), step=1)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
        with pytest.raises(InputError, match="no space left"):
            run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot({"a": torch.zeros(1_000_000)}), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_changed_settings_are_shown_as_a_diff(tmp_path: Path) -> None:
    old = {"recipe": {"epochs": 10, "lr": 0.1, "same": 1}, "students": ["a"]}
    run_settings.compare(old, json.loads(json.dumps(old)), run=tmp_path)
    with pytest.raises(InputError) as caught:
        run_settings.compare(old, {"recipe": {"epochs": 20, "same": 1}, "students": ["a", "b"]}, run=tmp_path)
    text = str(caught.value)
    for part in ("recipe.epochs: 10 -> 20", "recipe.lr: 0.1 -> absent", "students: ['a'] -> ['a', 'b']", "--force"):
        assert part in text
    assert "same" not in text


def test_starting_over_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    claim_folders(tmp_path, [tmp_path], base=True, fresh=False)
    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state()), step=1)
    for name in ("metrics.jsonl", "teacher.pth", "student.json", "mine.txt"):
        (tmp_path / name).write_text("{}\n")
    claim_folders(tmp_path, [tmp_path], base=True, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".robx-written", "mine.txt"]


def test_random_numbers_are_a_function_of_the_step() -> None:
    def draw(**place: int) -> torch.Tensor:
        seed_step(3, **place)
        return torch.rand(4)

    assert torch.equal(draw(step=5, rank=1), draw(step=5, rank=1))
    assert len({tuple(draw(step=s, rank=r).tolist()) for s in range(20) for r in range(4)}) == 80


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_a_process_that_dies_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path, call: str) -> None:
    run_checkpoint.save_checkpoint(tmp_path, run_checkpoint.snapshot(state(1)), step=1)
    for dies_at in range(1, 12):
        child = os.fork()
        if not child:
            _die_in(tmp_path, call, dies_at)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = run_checkpoint.load_newest(tmp_path)
        assert found is not None and found[0] in ((2,) if status == 0 else (1, 2))
        assert_same(found[1], state(found[0]))
        run_checkpoint.clean(tmp_path)
        assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000002", ignore_errors=True)
        if status == 0:
            assert dies_at > 1
            return
    pytest.fail(f"more than eleven calls of {call}")


def _die_in(run: Path, call: str, dies_at: int) -> None:
    """In a forked child: save a second checkpoint and lose power at the n-th call; never returns."""
    real, calls = getattr(os, call), 0

    def fatal(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            os._exit(137)
        return real(*arguments, **options)

    setattr(os, call, fatal)
    run_checkpoint.save_checkpoint(run, run_checkpoint.snapshot(state(2)), step=2)
    os._exit(0)
