"""What the commands take: wrong numbers are refused in the same words, and an option is given once."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from robx.cli import COMMANDS, LazyGroup, main
from robx.options import Command, Number, WholeNumber

EXPORT = ["export", "run", "--format", "onnx", "--int8"]
MINUTES = "invalid value for '--heal': must be a number of minutes above 0, got "


def _commands() -> list[tuple[str, click.Command]]:
    """Every command, those of a group as well."""
    found: list[tuple[str, click.Command]] = []
    waiting = [(name, LazyGroup().get_command(click.Context(main), name)) for name in COMMANDS]
    while waiting:
        name, command = waiting.pop()
        assert command is not None
        if isinstance(command, click.Group):
            waiting += [(f"{name} {sub}", one) for sub, one in command.commands.items()]
        else:
            found.append((name, command))
    return found


def test_every_command_refuses_repeated_options_and_words_numbers_alike() -> None:
    commands = _commands()
    assert [name for name, command in commands if not isinstance(command, Command)] == []
    plain = (click.types.IntParamType, click.types.FloatParamType)
    assert [
        (name, one.name)
        for name, command in commands
        for one in command.params
        if isinstance(one.type, plain) and not isinstance(one.type, Number | WholeNumber)
    ] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--epochs", "0"], "'--epochs': must be a whole number of at least 1, got '0'"),
        (["distill", "--epochs", "3.5"], "'--epochs': must be a whole number of at least 1, got '3.5'"),
        (["distill", "--lr", "nan"], "'--lr': must be a number above 0, got 'nan'"),
        (["distill", "--lr", "1e999"], "'--lr': must be a number above 0, got '1e999'"),
        (["distill", "--corrupt-budget", "x"], "'--corrupt-budget': must be a number from 0 to 1, got 'x'"),
        (["distill", "--teacher-mean", "0", "0", "x"], "'--teacher-mean': must be a number from 0 to 1, got 'x'"),
        (["bench", "b", "--seed", "-1"], "'--seed': must be a whole number of at least 0, got '-1'"),
        (["bench", "b", "--threads", "9" * 5000], "'--threads': must be a whole number of at least 1, got '999"),
        ([*EXPORT, "--max-drop", "abc"], "'--max-drop': must be a number above 0 and below 100, got 'abc'"),
        ([*EXPORT, "--budget", "inf"], "'--budget': must be a number of seconds of at least 0, got 'inf'"),
        (["eval", "r", "--margin", "nan"], "'--margin': must be a number above 0 and below 100, got 'nan'"),
        *(([*EXPORT, "--heal", wrong], f"{MINUTES}'{wrong}' (see") for wrong in ("-1", "0", "nan", "inf", "-inf")),
        ([*EXPORT, "--heal=-1"], f"{MINUTES}'-1' (see"),
        ([*EXPORT, "--heal", "abc"], f"{MINUTES}'abc': put RUN before --heal, or give the minutes (see"),
        ([*EXPORT[:1], *EXPORT[2:], "--heal", "/tmp/r"], f"{MINUTES}'/tmp/r': put RUN before --heal, or give the"),
        ([*EXPORT, "--heal", "--frce"], "no such option '--frce'"),
    ],
)  # fmt: skip
def test_a_wrong_number_is_refused_at_once_and_says_what_to_give(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 300


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--heal"], {"heal": 10.0}),
        (["--heal", "2"], {"heal": 2.0}),
        (["--heal=.5", "--on", "--on"], {"heal": 0.5, "on": True}),
        (["--name", "-1", "--name", "b", "--off", "--on"], {"name": ("-1", "b"), "on": True}),
    ],
)
def test_flags_and_lists_may_be_repeated(arguments: list[str], given: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}

    @click.command(cls=Command)
    @click.option("--heal", type=Number(0, min_open=True), is_flag=False, flag_value=10.0)
    @click.option("--name", multiple=True)
    @click.option("--on/--off")
    def command(**values: Any) -> None:
        seen.update(values)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert {"heal": None, "name": (), "on": False} | given == seen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--epochs", "3", "--epochs=3"], "--epochs is given twice: give it once (see main distill"),
        (["distill", "--recipe", "a", "--recipe", "quick"], 'one file, which may begin with like = "quick" (see'),
        (["report", "x", "-o", "a.html", "--out", "b.html"], "--out is given twice: give it once"),
        ([*EXPORT, "--heal", "--heal", "3"], "--heal is given twice: give it once"),
        (["device", "build", "--abi", "arm64-v8a", "--abi", "linux-arm64"], "--abi is given twice"),
    ],
)  # fmt: skip
def test_a_repeated_option_is_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.output
