from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from robx.cli import main
from robx.distill.training.run_folder import Metrics, tensorboard_writer
from robx.errors import InputError, MissingExtra
from robx.images.sources import open_source

Curves = dict[str, list[tuple[int, float]]]


def on_the_board(folder: Path) -> Curves:
    """What TensorBoard shows, by its own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_the_lines(folder: Path) -> Curves:
    found: Curves = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for key, value in line.items():
            if key not in ("step", "epoch") and value is not None:
                found.setdefault(key, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


class Stop(Exception):
    """As a power cut."""


def test_tensorboard_shows_the_metrics_of_a_run_that_was_broken_off(
    tiny: ModuleType, scenes: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Stop

    options = {"tensorboard": True, "checkpoint_steps": 2, "monitor_every": 3, "probe_every": 1, "probe_images": 20}
    source = open_source(scenes)
    with pytest.raises(Stop):
        tiny.tiny_run(source, tmp_path, options=options, progress=stop)
    assert on_the_board(tmp_path)["loss"][-1][0] == 5  # nothing waits for the writer's two minutes
    tiny.tiny_run(source, tmp_path, options=options)
    board = on_the_board(tmp_path)
    assert {"loss", "lr", "grad_norm", "embedding_std", "probe_knn"} <= board.keys()
    assert [step for step, _ in board["loss"]] == list(range(1, 9))  # the fifth once, not twice
    assert board == in_the_lines(tmp_path)
    tiny.tiny_run(source, tmp_path, recipe=tiny.tiny_recipe(seed=3), options=options | {"fresh": True})
    assert on_the_board(tmp_path) == in_the_lines(tmp_path) != board


def test_without_tensorboard_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"--tensorboard needs the package tensorboard.*pip install 'robx\[tensorb"):
        tensorboard_writer(tmp_path, step=0)


def test_metrics_are_cut_back_to_the_step_that_a_run_resumes_from(tmp_path: Path) -> None:
    first = Metrics(tmp_path, step=0)
    for step in range(5):
        first.add({"step": step, "loss": float("nan") if step == 2 else float(step)})
    with first.path.open("a") as file:
        file.write('{"step": 5, "lo')  # the power went

    def lines() -> list[Any]:
        return [json.loads(line) for line in first.path.read_text().splitlines()]

    Metrics(tmp_path, step=3).add({"step": 4, "loss": 0.5})
    assert [(line["step"], line["loss"]) for line in lines()] == [(0, 0.0), (1, 1.0), (2, None), (3, 3.0), (4, 0.5)]
    Metrics(tmp_path, step=0)  # killed before its first checkpoint: the line of step 0 comes again
    assert lines() == []


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".robx-written"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "name", ["student.json", "student.safetensors", "metrics.jsonl", "corrupt.txt", "recipe.json", "teacher.pth"]
)
def test_a_file_of_the_users_is_neither_removed_nor_replaced(
    tiny: ModuleType, scenes: Path, tmp_path: Path, name: str, fresh: bool
) -> None:
    (tmp_path / name).write_text("{}\n")
    recipe = tiny.tiny_recipe(objective="dino", base=True, head="native")
    with pytest.raises(InputError, match=rf"{name} was not written by robx and would be replaced"):
        tiny.tiny_run(open_source(scenes), tmp_path, recipe=recipe, options={"fresh": fresh})
    assert _files(tmp_path) == {name: b"{}\n"}


@pytest.mark.parametrize("fresh", [True, False])
def test_folders_of_another_tool_stay(tiny: ModuleType, scenes: Path, tmp_path: Path, fresh: bool) -> None:
    theirs = ("checkpoints/step-100/model.pt", "checkpoints/best.pt", "tensorboard/events", "teacher.pth", "notes.txt")
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    for _ in range(2):  # a run of robx's own goes into the folder and is started over
        tiny.tiny_run(open_source(scenes), tmp_path, options={"fresh": fresh, "checkpoint_steps": 2})
        found = _files(tmp_path)
        assert all(found[name] == name.encode() for name in theirs) and "student.json" in found


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_linked_folder_is_refused_and_nothing_is_lost(
    tiny: ModuleType, scenes: Path, tmp_path: Path, name: str, fresh: bool
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    tiny.tiny_run(open_source(scenes), run, options={"tensorboard": True})
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = _files(run), _files(elsewhere)
    with pytest.raises(InputError, match=f"{name} is a link"):
        tiny.tiny_run(open_source(scenes), run, recipe=tiny.tiny_recipe(seed=9), options={"fresh": fresh})
    assert (_files(run), _files(elsewhere)) == before and all(before)


def test_fresh_never_removes_what_the_run_reads(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe(objective="dino", base=True, head="native", prototypes=32)
    tiny.tiny_run(open_source(scenes), tmp_path, recipe=recipe)
    before = _files(tmp_path)
    more = ("--student", "test_vit", "--data", scenes, "--out", tmp_path, "--fresh", "--batch-size", "8")
    more += ("--crop-size", "32", "--local-crops", "0", "--epochs", "1", "--device", "cpu", "--workers", "0")
    for options in (
        ("--teacher", "dino", "--teacher-weights", tmp_path / "teacher.pth"),
        ("--teacher", "ema", "--init", tmp_path),
    ):
        found = CliRunner().invoke(main, ["distill", *map(str, (*options, *more))])
        assert found.exit_code == 2 and "which this run reads" in found.stderr, found.output
    assert _files(tmp_path) == before


def test_a_run_without_a_record_is_resumed_and_started_over(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    students = ("test_vit", "test_resnet")
    tiny.tiny_run(open_source(scenes), tmp_path, students=students)
    for record in tmp_path.rglob(".robx-written"):
        record.unlink()
    said: list[str] = []
    tiny.tiny_run(open_source(scenes), tmp_path, students=students, say=said.append)
    assert any("already holds the complete run" in text for text in said)
    for record in tmp_path.rglob(".robx-written"):
        record.unlink()
    before = _files(tmp_path)
    tiny.tiny_run(
        open_source(scenes), tmp_path, students=students, recipe=tiny.tiny_recipe(seed=3), options={"fresh": True}
    )
    assert sorted(_files(tmp_path)) == sorted(before) and _files(tmp_path) != before
