"""The command line: mounts each stage's commands, imported only when one is called."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from typing import Any

import click

from robx import __version__
from robx.errors import RobxError, one_line

# command -> (module, attribute, the line that `robx --help` shows); importing none of them keeps start-up fast.
COMMANDS = {
    "distill": ("robx.distill.commands", "distill", "Teach a small student what a large teacher sees, without labels."),
    "eval": ("robx.eval.commands", "evaluate", "kNN, linear, low-shot and transfer accuracy of a student or a bundle."),
    "export": ("robx.export.commands", "export", "Turn a student into ONNX, OpenVINO, TensorRT or a mobile format."),
    "inspect": ("robx.export.commands", "inspect", "Show what is in a bundle: layers, precisions, sizes, verdict."),
    "bench": ("robx.runtime.commands", "bench", "Measure bundles on a device: latency, memory, the same answers."),
    "run": ("robx.runtime.commands", "run", "Embed or label images with a bundle."),
    "report": ("robx.eval.commands", "report", "One page that says what to deploy, and why."),
    "demo": ("robx.demo.demo", "demo", "The whole way on real images, in minutes on two cores."),
    "teachers": ("robx.distill.commands", "teachers", "List the teachers: file, licence, published accuracy."),
    "students": ("robx.distill.commands", "students", "List the students that are tested the whole way."),
    "doctor": ("robx.runtime.commands", "doctor", "Say what this machine, or a device, can do and what it lacks."),
}


# What a file system refuses is no defect of robx, wherever it comes up.
_NOT_OURS = {
    errno.EACCES: "fix its permissions",
    errno.EPERM: "fix its permissions",
    errno.EROFS: "choose another folder",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount its file system again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links go round in a circle",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used, and prints robx's errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the work."""
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
        """As click's, but a misspelt command offers the nearest."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1) if args and args[0] not in COMMANDS else []
        if near and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}: did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a RobxError becomes one line on standard error and its exit status."""
        try:
            return super().invoke(ctx)
        except RobxError as error:
            click.echo(f"robx: {one_line(str(error))}", err=True)
            ctx.exit(error.exit_status)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            where = f"{os.fsdecode(error.filename)[:200]}: " if isinstance(error.filename, str | bytes) else ""
            click.echo(f"robx: {one_line(where)} {error.strerror}: {_NOT_OURS[error.errno]}", err=True)
            ctx.exit(RobxError.exit_status)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="robx")
def main() -> None:
    """Make a large self-supervised vision model small enough for the edge, and prove it with numbers.

    \b
    robx distill --teacher dino_vits16 --student resnet18 --data images/ --out runs/r18
    robx eval    runs/r18 --data images/ --knn
    robx export  runs/r18 --format openvino --int8 --data images/
    robx bench   runs/r18/openvino-int8
    robx report  runs/r18

    Exit status: 0 done; 2 the input is wrong, and the line says what to do; 3 written, but the gate did not pass;
    75 interrupted with its state saved, and the same command goes on.
    """


if __name__ == "__main__":
    sys.exit(main())
