"""The end of `robx distill`: the kNN line, and commands to copy that are commands of robx."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click
import pytest

from robx.cli import main
from robx.distill.next_steps import knn_line, next_lines

START = {"step": 0, "epoch": 0.0, "probe_knn": 38.04, "teacher_probe_knn": 61.2}
LAST = {"step": 40, "epoch": 2.0, "probe_knn": 52.11}


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ([], ""),
        ([{"step": 3, "loss": 1.5}], ""),
        ([LAST], "kNN accuracy 52.1 % in epoch 2"),
        (
            [START, {"step": 3, "loss": 1}, LAST],
            "kNN accuracy 52.1 % in epoch 2 (38.0 % before training, teacher 61.2 %)",
        ),
        ([START], "kNN accuracy 38.0 % in epoch 0 (teacher 61.2 %)"),
    ],
)
def test_the_last_knn_evaluation_is_told_with_its_references(tmp_path: Path, lines: list[object], shown: str) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 41, "probe_k')  # a line that is being written
    assert knn_line(tmp_path) == shown


def test_a_run_without_metrics_has_no_line(tmp_path: Path) -> None:
    assert knn_line(tmp_path) == ""


def test_the_commands_to_copy_parse_and_name_the_folder_with_both_splits(tmp_path: Path) -> None:
    data = tmp_path / "my images" / "train"
    data.mkdir(parents=True)
    lines = next_lines([Path("runs/a b"), Path("runs/c")], data=data, image_member="rgb.jpg")
    for line in lines[:2]:
        program, command, *arguments = shlex.split(line)
        assert program == "robx" and arguments[arguments.index("--data") + 1] == str(data.parent)
        context = click.Context(main)
        found = main.get_command(context, command)
        assert found is not None
        found.make_context(command, list(arguments))  # raises where an option does not exist
    python, flag, code = shlex.split(lines[2])
    assert (python, flag) == ("python", "-c") and "api.load('runs/a b')" in code
    compile(code, "hint", "exec")
