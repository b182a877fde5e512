"""The command line: every command has help that shows an example; a user's error is one line and status 2."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from robx.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert f"robx {command}" in result.output


def test_help_lists_every_command_in_the_order_of_the_work() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    places = [output.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_a_misspelt_command_offers_the_nearest() -> None:
    result = CliRunner().invoke(main, ["exprot"])
    assert result.exit_code == 2
    assert "did you mean 'export'?" in result.output


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENAMETOOLONG, "give a shorter name"), (errno.ESTALE, "mount its file system again"), (errno.EIO, "disk")],
)
def test_what_a_file_system_refuses_anywhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(path: object) -> None:
        raise OSError(number, os.strerror(number), "odd\n\x1b[31mname")

    monkeypatch.setattr("robx.records.load_bundle", refuse)
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert result.exit_code == 2
    assert result.stderr.startswith("robx: odd \\x1b[31mname: ") and said in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_operating_systems_error_that_is_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("robx.records.load_bundle", refuse)
    assert isinstance(CliRunner().invoke(main, ["inspect", "x"]).exception, OSError)


DISTIL = ["distill", "--out", "{out}", "--data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*DISTIL, "{scenes}", "--teacher", "dino_vits61", "--student", "resnet18"],
            "dino_vits16",
        ),
        ([*DISTIL, "{scenes}", "--teacher", "ema", "--student", "resnet81"], "resnet18"),
        (
            [*DISTIL, "{out}/none", "--teacher", "ema", "--student", "resnet18"],
            "does not exist",
        ),
        (["eval", "{out}/none", "--data", "{scenes}"], "none"),
        (["export", "{out}/none", "--format", "onnx"], "none"),
        (["inspect", "{out}/none"], "none"),
        (["bench", "{out}/none"], "none"),
        (["run", "{out}/none", "{scenes}"], "none"),
        (["report", "{out}/none"], "none"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, scenes: Path, tmp_path: Path) -> None:
    filled = [a.format(scenes=scenes, out=tmp_path / "run") for a in arguments]
    result = CliRunner().invoke(main, filled)
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "student.json").exists()
