"""The demo runs the commands a user would type, reuses finished steps, and continues after an interruption."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from robx.cli import main
from robx.demo import demo as module
from robx.demo.demo_data import DemoData
from robx.errors import GateFailed, InputError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the demo runs; each writes the files it promises."""
    made: list[list[str]] = []

    def call(arguments: list[str]) -> None:
        made.append(arguments)
        for step in module.plan(_images(Path("data")), out=Path("run"), teacher="t", student="s", epochs=3):
            if step.command[0] == arguments[0]:
                for path in step.makes:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()

    monkeypatch.setattr(module, "_call", call)
    monkeypatch.setattr(module, "_show", lambda path: None)
    monkeypatch.setattr(module, "_runnable_bundles", lambda run: [run / "onnx-fp32"])
    return made


def _images(folder: Path) -> DemoData:
    return DemoData(folder, "scenes", "made by robx", "Scenes.")


def _demo(scene_shards: Path, *more: str) -> str:
    result = CliRunner().invoke(main, ["demo", "--data", str(scene_shards), "--out", "run", *more])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_command_of_the_plan_is_valid(scene_shards: Path) -> None:
    for step in module.plan(_images(scene_shards), out=Path("run"), teacher="t", student="s", epochs=3):
        command = main.get_command(click.Context(main), step.command[0])
        assert command is not None
        command.make_context("robx", list(step.command[1:]))  # raises on an option that does not exist


def test_a_second_run_reuses_the_steps_and_a_changed_one_does_not(
    calls: list[list[str]], scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = _demo(scene_shards)
    assert [c[0] for c in calls] == ["distill", "export", "export", "export", "export", "eval", "bench", "report"]
    assert "$ robx distill --teacher" in first and "[8/8]" in first
    calls.clear()
    assert _demo(scene_shards).count("already done, reused") == 8 and not calls
    _demo(scene_shards, "--epochs", "4")
    assert len(calls) == 8


def test_an_interrupted_demo_continues_where_it_stopped(
    calls: list[list[str]], scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = module._call

    def broken(arguments: list[str]) -> None:
        if "onnx" in arguments:
            raise InputError("no space left")
        good(arguments)

    monkeypatch.setattr(module, "_call", broken)
    result = CliRunner().invoke(main, ["demo", "--data", str(scene_shards), "--out", "run"])
    assert result.exit_code == 2 and "no space left" in result.stderr
    monkeypatch.setattr(module, "_call", good)
    calls.clear()
    _demo(scene_shards)
    assert calls[0][:1] == ["export"] and len(calls) == 7


def test_a_refused_export_and_a_missing_package_do_not_end_it(
    calls: list[list[str]], scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = module._call

    def picky(arguments: list[str]) -> None:
        if "--int8" in arguments:
            raise GateFailed("no int8 candidate passed")
        if "trt" in arguments:
            raise InputError("tensorrt_rtx is missing")
        good(arguments)

    monkeypatch.setattr(module, "_call", picky)
    output = _demo(scene_shards)
    assert "no int8 candidate passed" in output and "skipped: tensorrt_rtx is missing" in output


def test_images_without_labels_are_refused_at_once(tmp_path: Path, scenes: Path) -> None:
    flat = next((scenes / "train").iterdir())
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(flat)
    result = CliRunner().invoke(main, ["demo", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "has no labels" in result.stderr
