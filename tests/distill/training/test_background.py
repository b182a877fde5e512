"""Checkpoints are written beside training, from a copy, one at a time, and their errors stop the run."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robx.distill.training import run_checkpoint
from robx.distill.training.background import BackgroundWriter
from robx.errors import InputError
from robx.images.sources import ImageSource, open_source


@pytest.fixture
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


def fail() -> None:
    raise InputError("no space left to write x: free some space and run the same command again")


def test_one_write_after_the_other() -> None:
    writer, order, go = BackgroundWriter(), list[str](), threading.Event()

    def first() -> None:
        go.wait(30)
        order.append("first")

    writer.start(first)
    writer.check()  # does not wait
    assert order == []
    threading.Timer(0.05, go.set).start()
    writer.start(lambda: order.append("second"))
    writer.wait()
    writer.wait()
    assert order == ["first", "second"]


def test_an_error_is_raised_once_where_training_meets_it() -> None:
    writer = BackgroundWriter()
    for meet in (writer.wait, lambda: writer.start(lambda: None)):
        writer.start(fail)
        with pytest.raises(InputError, match="no space left"):
            meet()
        writer.wait()
    writer.start(fail)
    with pytest.raises(InputError, match="no space left"):
        while True:
            writer.check()
    with pytest.raises(InputError, match="no space left"), writer:
        writer.start(fail)


def test_a_run_that_fails_finishes_its_write_and_raises_its_own_error() -> None:
    go, ended = threading.Event(), list[int]()
    with pytest.raises(ValueError, match="of the run"), BackgroundWriter() as writer:
        writer.start(lambda: (go.wait(30), ended.append(1), fail()))
        threading.Timer(0.05, go.set).start()
        raise ValueError("of the run")
    assert ended == [1]


def test_a_second_interrupt_does_not_wait() -> None:
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.start(lambda: go.wait(60))
        raise KeyboardInterrupt
    assert writer._thread is not None and writer._thread.daemon
    go.set()
    writer.wait()


@pytest.mark.parametrize("values", [{}, {"objective": "dino", "base": True, "student_ema": 0.9}])
def test_training_goes_on_and_the_checkpoint_is_that_of_its_step(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """The writes of steps 3 and 6 wait until two more steps are done, and hold what they would have held at once."""
    recipe = tiny.tiny_recipe(**values)
    options = {"checkpoint_steps": 3, "keep": 100}
    tiny.tiny_run(source, tmp_path / "plain", recipe=recipe, options=options)
    real, reached = run_checkpoint.save_checkpoint, {step: threading.Event() for step in range(1, 9)}

    def held(run: Path, state: run_checkpoint.Snapshot, *, step: int, **more: Any) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        assert reached[min(step + 2, 8)].wait(60)
        return real(run, state, step=step, **more)

    monkeypatch.setattr(run_checkpoint, "save_checkpoint", held)
    progress = lambda done, total, note: reached[done].set()  # noqa: E731
    tiny.tiny_run(source, tmp_path / "held", recipe=recipe, options=options, progress=progress)
    folders = [run_checkpoint.checkpoints(tmp_path / run) for run in ("plain", "held")]
    assert [path.name[-1] for path in folders[1]] == ["3", "6", "8"]
    for one, other in zip(*folders, strict=True):
        for name in ("state.safetensors", "state.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
    students = [tmp_path / run / "student.safetensors" for run in ("plain", "held")]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_a_failed_write_stops_the_run_at_its_next_step(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = run_checkpoint.save_checkpoint, list[int]()

    def full(run: Path, state: run_checkpoint.Snapshot, *, step: int, **more: Any) -> Path:
        if step == 4:
            fail()
        return real(run, state, step=step, **more)

    monkeypatch.setattr(run_checkpoint, "save_checkpoint", full)
    progress = lambda done, total, note: steps.append(done)  # noqa: E731
    with pytest.raises(InputError, match="no space left to write x"):
        tiny.tiny_run(source, tmp_path, options={"checkpoint_steps": 2}, progress=progress)
    assert steps[-1] in (4, 5, 6)
    found = run_checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 2
