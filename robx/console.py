"""What the commands print: results and tables on standard output; progress and notes on standard error."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from robx import interrupts
from robx.errors import duration, visible
from robx.progress import Fact, Progress, silent

# Seconds between two lines of progress where there is no terminal (a log, CI).
_LINE_SECONDS = 15.0
# Columns of a table in a file or a pipe, where no terminal sets them.
_WIDTH = 160
_COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "FORCED": "magenta", "NOT_JUDGED": "yellow"}


_QUIET = "robx.quiet"  # key of click's context
Command = TypeVar("Command", bound=Callable[..., Any])


def quiet_option(command: Command) -> Command:
    """The option --quiet, for commands that take long; `progress_bar`, `announce` and `say` obey it."""

    def remember(context: click.Context, _: click.Parameter, quiet: bool) -> None:
        context.meta[_QUIET] = quiet
        if quiet:  # the stages of a plan are functions of robx.api, which write to a logger
            log = logging.getLogger("robx")
            log.addFilter(_is_no_fact)
            context.call_on_close(lambda: log.removeFilter(_is_no_fact))

    help_text = "Print only results, warnings and errors: no progress and no other facts about the run."
    return click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=remember, help=help_text)(command)


def _is_no_fact(record: logging.LogRecord) -> bool:
    return not isinstance(record.msg, Fact)


def _is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """A Progress: a bar on a terminal, a line every 15 seconds elsewhere, nothing with --quiet or when `quiet`.

    Each call ends the command if it was interrupted, even where a library has swallowed the interruption.
    """
    console = Console(stderr=True)
    if quiet or _is_quiet():
        yield _interruptible(silent)
    elif not console.is_terminal:
        yield _interruptible(_plain_lines())
    else:
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
            task, work = bar.add_task("", total=None), _Work()

            def show(done: int, total: int, note: str) -> None:
                if work.begins(done, total, note):
                    bar.reset(task)
                # A total of 1 says nothing about the remaining time: show an indeterminate bar.
                bar.update(task, completed=done, total=total if total > 1 else None, description=escape(visible(note)))

            yield _interruptible(show)


def _interruptible(progress: Progress) -> Progress:
    def show(done: int, total: int, note: str) -> None:
        interrupts.check()
        progress(done, total, note)

    return show


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    right: Collection[int] = (),
    dim: Collection[int] = (),
) -> None:
    """Print a table on standard output; verdicts are coloured.

    Args:
        headings: column headings.
        rows: plain text, one cell per column.
        title: printed above the table.
        right: indices of the columns to align on the right.
        dim: indices of the rows to print dim, because they are not reliable.
    """
    shown = escape(visible(title))
    table = Table(
        box=box.SIMPLE_HEAD,
        title=shown or None,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        table.add_column(escape(visible(heading)), justify="right" if number in right else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*(_coloured(cell) for cell in row), style="dim" if number in dim else None)
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def print_line(text: str, *, dim: bool = False) -> None:
    """Print one line on standard output; verdicts are coloured."""
    Console().print(_coloured(text), style="dim" if dim else None, soft_wrap=True)


def hints(heading: str, lines: Sequence[str]) -> None:
    """Print commands to copy, one a line, if standard output is a terminal: a file or a pipe gets results only."""
    if sys.stdout.isatty() and not _is_quiet():
        click.echo("\n".join((visible(heading), *(f"  {visible(line)}" for line in lines))))


def say(text: str) -> None:
    """Print one line on standard error; a Fact only without --quiet."""
    if not (isinstance(text, Fact) and _is_quiet()):
        sys.stderr.write(f"{visible(text)}\n")  # rich prints it above a progress bar


def announce(text: str) -> None:
    """Print one line of progress on standard error, unless the command has --quiet."""
    say(Fact(text))


def _coloured(words: str) -> Text:
    text = Text(visible(words))
    for verdict, colour in _COLOURS.items():
        text.highlight_regex(rf"\b{verdict}\b", colour)
    return text


class _Work:
    """Detects, from the calls of a Progress, where a new piece of work starts."""

    def __init__(self) -> None:
        self.done, self.total, self.note = -1, -1, ""

    def begins(self, done: int, total: int, note: str) -> bool:
        """Whether this call is the first of a piece of work. Notes may change within one: they contain figures."""
        new = done < self.done or total != self.total or (done == 0 and note != self.note)
        self.done, self.total, self.note = done, total, note
        return new


def _plain_lines() -> Progress:
    work, started, first, printed = _Work(), 0.0, 0, -math.inf

    def show(done: int, total: int, note: str) -> None:
        nonlocal started, first, printed
        now = time.monotonic()
        if work.begins(done, total, note):
            started, first, printed = now, done, -math.inf
        if now - printed < _LINE_SECONDS and done < total:
            return
        printed = now
        if total <= 1:
            say(note)
            return
        left = (now - started) / (done - first) * (total - done) if done > first else 0.0
        tail = f", about {duration(left)} left" if left else ""
        say(f"{note}: {done} of {total}{tail}")

    return show
