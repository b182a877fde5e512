"""The command line: each stage's commands, imported only when one is called."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

import click

from robx import __version__, interrupts
from robx.errors import Interrupted, NoSpace, RobxError, first_line, is_exhausted, is_full, one_line

# command -> (module, attribute, its line in `robx --help`); not importing them keeps start-up fast.
COMMANDS = {
    "distill": ("robx.distill.commands", "distill", "Train a small student from a large teacher, without labels."),
    "recipe": ("robx.distill.commands", "recipe", "Print a training recipe in TOML, with every key explained."),
    "eval": (
        "robx.eval.commands",
        "evaluate",
        "Measure a student's or bundle's accuracy: kNN, linear, low-shot, transfer.",
    ),
    "export": ("robx.export.commands", "export", "Export a student to ONNX, OpenVINO, TensorRT or a mobile format."),
    "inspect": ("robx.export.commands", "inspect", "Show what a bundle contains: layers, precisions, sizes, verdict."),
    "bench": ("robx.runtime.commands", "bench", "Measure bundles on a device: latency, memory, agreement of outputs."),
    "run": ("robx.runtime.commands", "run", "Compute embeddings or labels of images with a bundle."),
    "check": ("robx.runtime.commands", "check", "Check your own program's output for a bundle's golden image."),
    "report": ("robx.eval.commands", "report", "Write one page that recommends what to deploy, and why."),
    "ship": ("robx.ship.commands", "ship", "Run all of the above from one plan: teacher to report."),
    "demo": ("robx.demo.demo", "demo", "Run every step on real images, in minutes on two cores."),
    "teachers": ("robx.distill.commands", "teachers", "List the teachers: file, licence, published accuracy."),
    "students": ("robx.distill.commands", "students", "List the students that are tested end to end."),
    "device": ("robx.runtime.commands", "device", "Build the native runner for phones and boards without Python."),
    "doctor": ("robx.runtime.commands", "doctor", "Check what this machine or a device supports, and what is missing."),
}


# Errors of the file system are not bugs in robx, wherever they come up; the remedy of each.
_REMEDIES = {
    errno.EACCES: "fix its permissions",
    errno.EPERM: "fix its permissions",
    errno.EROFS: "choose another folder",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount its file system again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove the loop in its symbolic links",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


class LazyGroup(click.Group):
    """A click group that imports a command when it is called, and prints robx's errors as one line."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line; closed standard streams are replaced first."""
        with _open_streams(), interrupts.ended_by_signals():
            return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Like click's; wrong arguments before the command become one line."""
        try:
            return super().make_context(*args, **extra)
        except click.UsageError as error:
            raise _one_line_usage(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, but suggests the closest command for a misspelt one."""
        near = difflib.get_close_matches(args[0].lower(), COMMANDS, n=1) if args and args[0] not in COMMANDS else []
        if near and not args[0].startswith("-"):
            ctx.fail(f"unknown command {args[0]!r}: did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a RobxError becomes one line on standard error and its exit status, and so does a signal."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            interrupts.check()  # a library may have swallowed the interruption: the results are not to be trusted
            return result
        except BaseException as error:  # a library in Rust that runs out of memory panics, which is no Exception
            if isinstance(error, KeyboardInterrupt) or interrupts.arrived() is not None:
                _fail(ctx, _interruption(ctx.invoked_subcommand or ""), Interrupted.exit_status)
            _report(ctx, error)


def _report(ctx: click.Context, error: BaseException) -> NoReturn:
    """End with one line and the exit status of an error, or raise it again if it is a bug in robx."""
    if isinstance(error, click.UsageError):
        raise _one_line_usage(error, command=f"{ctx.command_path} {ctx.invoked_subcommand}") from error
    if isinstance(error, BrokenPipeError):
        _drop(sys.stdout)
        _fail(ctx, "standard output was closed by the program that reads it: stopped", NoSpace.exit_status)
    if isinstance(error, RobxError):
        _fail(ctx, str(error), NoSpace.exit_status if is_full(error) else error.exit_status)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        if is_full(error):
            _drop(sys.stdout)  # what could not be written is still in its buffer
        where = f"{os.fsdecode(error.filename)[:200]}: " if isinstance(error.filename, str | bytes) else ""
        status = NoSpace.exit_status if is_full(error) else RobxError.exit_status
        _fail(ctx, f"{where}{error.strerror}: {_REMEDIES[error.errno]}", status)
    if is_exhausted(error) and not isinstance(error, click.exceptions.Exit | click.Abort | SystemExit):
        remedy = "free memory, raise the limit (ulimit -v, ulimit -u), or use a smaller batch and fewer threads"
        _fail(ctx, f"not enough memory or threads ({first_line(error)}): {remedy}", RobxError.exit_status)
    raise error


def _fail(ctx: click.Context, message: str, status: int) -> NoReturn:
    click.echo(f"robx: {one_line(message)}", err=True)
    ctx.exit(status)


# Commands that keep what they have finished when they are interrupted.
_RESUMES = ("distill", "export", "ship", "demo")


def _interruption(command: str) -> str:
    """What to say of a command that a signal ended; a KeyboardInterrupt without a noted signal was Ctrl-C."""
    again = "run the same command to resume" if command in _RESUMES else "run the same command again"
    return f"interrupted by {(interrupts.arrived() or signal.SIGINT).name}: {again}"


class _UsageLine(click.UsageError):
    """Wrong arguments, in one line as every other error of robx."""

    def show(self, file: Any = None) -> None:
        """Print the line on standard error."""
        click.echo(f"robx: {one_line(self.format_message())}", err=True, file=file)


def _one_line_usage(error: click.UsageError, *, command: str = "robx") -> click.UsageError:
    """click's error with its usage and hint, of four lines and more, as one line; the help of a bare `robx` stays.

    Args:
        error: what click raised.
        command: whose help to name when the error does not know its command.
    """
    if isinstance(error, (_UsageLine, getattr(click.exceptions, "NoArgsIsHelpError", _UsageLine))):
        return error
    message = error.format_message()
    command = error.ctx.command_path if error.ctx else command
    return _UsageLine(f"{message[:1].lower()}{message[1:].rstrip('.')} (see {command} --help)", error.ctx)


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """Replace standard streams that are closed (``>&-``), or the next file that is opened would take their number.

    Output to a closed standard output is lost; a command that wrote some then ends with one line and exit status 1.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    given = sys.stdout, sys.stderr
    lost = _Lost(io.BytesIO())
    sys.stdout = given[0] or lost
    sys.stderr = _Forgiving(given[1] or io.StringIO())
    try:
        yield
    except SystemExit as end:
        if lost.written and not end.code:
            sys.stderr.write("robx: standard output is closed: what the command printed is lost\n")
            raise SystemExit(1) from None
        raise
    finally:
        sys.stdout, sys.stderr = given


class _Lost(io.TextIOWrapper):
    """In place of a closed standard output: forgets what is written, and remembers that something was."""

    written = False

    def write(self, text: str) -> int:
        self.written = self.written or bool(text)
        return len(text)


class _Forgiving:
    """Standard error whose reader may go away (a log's pipe, a terminal): a run must not die of a progress line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop(stream: TextIO) -> None:
    """Send the rest of a stream nowhere, so that the interpreter's last flush does not fail too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="robx")
def main() -> None:
    """Distil large self-supervised vision models into small ones, export them, and measure them on edge devices.

    \b
    robx distill --teacher dino_vits16 --student resnet18 --data images/ --out runs/r18
    robx eval    runs/r18 --data images/ --knn
    robx export  runs/r18 --format openvino --int8 --data images/
    robx bench   runs/r18/openvino-int8
    robx report  runs/r18

    Exit status: 0 success; 1 the output could not be written (no space left, or its reader has gone), or a bug in
    robx; 2 wrong input, with one line that says what to do; 3 a gate or a check failed; 75 interrupted by a signal:
    run the same command again.
    """


if __name__ == "__main__":
    sys.exit(main())
