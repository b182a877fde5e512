"""What the commands print: a progress bar with the remaining time, and tables. All but answers goes to stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from robx.progress import Progress, silent

# Where no terminal shows a bar (a log, CI), one line now and then.
_LINE_SECONDS = 15.0


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """A Progress that draws a bar on a terminal, prints a line now and then elsewhere, or nothing when `quiet`."""
    console = Console(stderr=True)
    if quiet:
        yield silent
    elif not console.is_terminal:
        yield _plain_lines()
    else:
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            last = [""]

            def show(done: int, total: int, note: str) -> None:
                if _stage(note) != last[0]:
                    last[0] = _stage(note)
                    bar.reset(task)
                bar.update(task, completed=done, total=total, description=escape(note))

            yield show


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: Sequence[int] = ()
) -> None:
    """Print a table on standard output; the columns whose numbers are in `right` are aligned on the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def say(text: str) -> None:
    """One line on standard error."""
    click.echo(text, err=True)


def _stage(note: str) -> str:
    """The part of a note that names the work: without figures, which change at every call."""
    return note.split(",", 1)[0].split(":", 1)[0]


def _plain_lines() -> Progress:
    started = [time.monotonic()]
    printed = [0.0]
    stage = [""]

    def show(done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if _stage(note) != stage[0]:
            stage[0], started[0], printed[0] = _stage(note), now, 0.0
        if now - printed[0] < _LINE_SECONDS and done < total:
            return
        printed[0] = now
        left = (now - started[0]) / done * (total - done) if done else 0.0
        tail = f", about {left:.0f} s left" if done and done < total else ""
        say(f"{note}: {done} of {total}{tail}")

    return show
