from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robx.distill.training.run_folder import Metrics, tensorboard_writer
from robx.errors import MissingExtra
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
