"""What a call of the API reports: a line in a notebook, a bar on a terminal, the logger elsewhere."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from robx.reporting import reporting


class ZMQInteractiveShell:
    """Named as the shell of a Jupyter kernel."""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_notebook_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with reporting("auto") as (progress, say):
        progress(0, 10, "training")
        progress(1, 10, "training")  # too soon after the first
        say("skipped \x1b[31mone\nimage")
        progress(10, 10, "training")
    lines = shown.getvalue().replace("\r", "").split("\n")
    assert [line.rstrip() for line in lines] == [
        "training: 0 of 10",
        "skipped \\x1b[31mone\\nimage",
        "training: 10 of 10",
        "",
    ]


def test_a_terminal_gets_the_bar_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := _Terminal())
    with reporting("auto") as (progress, say):
        progress(1, 2, "training")
        say("a message")
    assert "a message\n" in shown.getvalue()


def test_elsewhere_the_logger_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with caplog.at_level(logging.INFO, logger="robx"), reporting("auto") as (progress, say):
        progress(0, 10, "training")
        progress(1, 10, "training")
        progress(10, 10, "training")
        say("skipped an image")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "training: 0 of 10"),
        ("INFO", "training: 10 of 10"),
        ("WARNING", "skipped an image"),
    ]
    assert not shown.getvalue()


def test_none_is_silent_and_a_callable_is_called(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="robx"), reporting(None) as (progress, _):
        progress(1, 2, "training")
    assert not caplog.records
    seen: list[tuple[int, int, str]] = []
    with reporting(lambda *told: seen.append(told)) as (progress, _):
        progress(1, 2, "training")
    assert seen == [(1, 2, "training")]
