"""Progress in a log: a line at the start and end of each task, and the remaining time in between."""

import logging

import click
import pytest
from click.testing import CliRunner

from robx import console
from robx.cli import main
from robx.progress import Fact


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_15_seconds_with_the_remaining_time(clock, capsys):
    with console.progress_bar() as progress:
        for done in range(101):  # one a second; the figures in the note change all the time
            progress(done, 100, f"loss {1 / (done + 1):.3f}")
            clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 100 // 15 + 1
    assert lines[0] == "loss 1.000: 0 of 100"
    assert lines[1] == "loss 0.062: 15 of 100, about 85 seconds left"
    assert lines[-1] == "loss 0.010: 100 of 100"


def test_the_remaining_time_of_resumed_work_counts_from_the_resume(clock, capsys):
    with console.progress_bar() as progress:
        progress(500, 600, "step")
        clock[0] += 20
        progress(510, 600, "step")
    assert capsys.readouterr().err.splitlines()[-1] == "step: 510 of 600, about 3 minutes left"


def test_each_piece_of_work_begins_with_a_line(clock, capsys):
    with console.progress_bar() as progress:
        progress(0, 1, "exporting")
        progress(0, 1, "measuring ranges")
        for done, bundle in enumerate(("a", "b", "a")):  # one piece of work on several things
            progress(done, 3, bundle)
    assert capsys.readouterr().err.splitlines() == ["exporting", "measuring ranges", "a: 0 of 3"]


def test_quiet_work_says_nothing(capsys):
    with console.progress_bar(quiet=True) as progress:
        progress(1, 1, "x")
    assert capsys.readouterr() == ("", "")


@click.command()
@console.quiet_option
def long_command():
    with console.progress_bar() as progress:
        progress(0, 10, "working")
    console.announce("next stage")
    console.say("warning")
    console.say(Fact("fact"))
    logging.getLogger("robx").warning(Fact("fact of a stage"))
    logging.getLogger("robx").warning("warning of a stage")
    console.hints("Next:", ["robx eval runs/r18"])
    console.print_line("result")


@pytest.mark.parametrize(
    ("options", "errors", "logged"),
    [
        ((), "working: 0 of 10\nnext stage\nwarning\nfact\n", ["fact of a stage", "warning of a stage"]),
        (("--quiet",), "warning\n", ["warning of a stage"]),
    ],
)
def test_quiet_hides_progress_and_facts_and_nothing_else(options, errors, logged, caplog):
    found = CliRunner().invoke(long_command, options)
    assert found.exit_code == 0 and found.stderr == errors and caplog.messages == logged
    assert not logging.getLogger("robx").filters  # the next command in this process is as talkative as ever
    assert found.stdout == "result\n"  # not a terminal: no hints


@pytest.mark.parametrize("name", ["distill", "export", "eval", "bench", "ship", "demo"])
def test_commands_that_take_long_can_be_quiet(name):
    command = main.get_command(click.Context(main), name)
    assert "--quiet" in {option for parameter in command.params for option in parameter.opts}


def test_hints_are_for_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True)
    console.hints("Next:", ["robx eval runs/r18"])
    assert capsys.readouterr().out == "Next:\n  robx eval runs/r18\n"


def test_a_table_prints_what_it_is_given(capsys):
    console.print_table(("file", "verdict"), [("[odd] name" * 12, "PASS")], title="[odd] title", dim=(0,))
    printed = capsys.readouterr().out
    assert "[odd] title" in printed and "[odd] name" * 12 in printed and "PASS" in printed


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "bell\x07", "\u202eleft", "caf\udce9"])
def test_no_name_reaches_the_terminal_raw(capsys, name):
    console.say(f"skipped {name}")
    console.print_line(name)
    console.print_table((name,), [(name,)], title=name)
    with console.progress_bar() as progress:
        progress(0, 1, name)
    out, errors = capsys.readouterr()
    shown = name.encode("unicode_escape").decode()
    assert out.count(shown) == 4 and errors == f"skipped {shown}\n{shown}\n"
    assert name not in out + errors


def test_a_line_stays_one_line(capsys):
    console.print_line("[odd name]: FAIL, " + "x" * 300)
    assert capsys.readouterr().out == "[odd name]: FAIL, " + "x" * 300 + "\n"
