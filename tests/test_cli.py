"""The command line: every command has help that shows an example; a user's error is one line and status 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from robx.cli import COMMANDS, main
from robx.errors import ArtifactError, InputError, NoSpace, RobxError


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert f"robx {command}" in result.output


def test_help_lists_every_command_in_order_of_use() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    places = [output.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_a_misspelt_command_suggests_the_closest() -> None:
    result = CliRunner().invoke(main, ["exprot"])
    assert result.exit_code == 2
    assert "did you mean 'export'?" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such"], "robx: no such option '--no-such' (see main --help)"),
        (["bench"], "missing argument 'BUNDLES...' (see main bench --help)"),
        (["export", "run"], "missing option '--format'"),
        (["export", "run", "--format", "gguf"], "'gguf' is not one of 'onnx'"),
        (["distill", "--epochs", "0"], "invalid value for '--epochs'"),
        (["distill", "--studnt", "resnet18"], "'--student'"),
        (["run", "bundle"], "missing argument 'IMAGES...'"),
        (["doctor", "--device"], "requires an argument (see main doctor --help)"),
        (["report", "x", "-o", "a", "-z"], "no such option '-z'"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("robx: ") and said in result.stderr and result.stderr.count("\n") == 1


def test_robx_alone_prints_its_help() -> None:
    result = CliRunner().invoke(main, [])
    assert "Commands:" in result.output and "robx distill" in result.output


@pytest.mark.parametrize(("command", "longest"), [("teachers", "dino_xcit_medium_24_p16 "), ("students", "vit_small_")])
def test_the_lists_fit_80_columns(command: str, longest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robx.console._WIDTH", 80)
    output = CliRunner().invoke(main, [command]).output
    assert max(map(len, output.splitlines())) <= 80 and longest in output  # which is not folded


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENAMETOOLONG, "give a shorter name"), (errno.ESTALE, "mount its file system again"), (errno.EIO, "disk")],
)
def test_an_error_of_the_file_system_is_one_line(monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    def refuse(path: object) -> None:
        raise OSError(number, os.strerror(number), "odd\n\x1b[31mname")

    monkeypatch.setattr("robx.records.load_bundle", refuse)
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert result.exit_code == 2
    assert result.stderr.startswith("robx: odd \\x1b[31mname: ") and said in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unexpected_os_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("robx.records.load_bundle", refuse)
    assert isinstance(CliRunner().invoke(main, ["inspect", "x"]).exception, OSError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_a_machine_without_memory_or_threads_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(path: object) -> None:
        raise error

    monkeypatch.setattr("robx.records.load_bundle", fail)
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("robx: not enough memory or threads (") and "ulimit -v" in result.stderr


def test_another_runtime_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("robx.records.load_bundle", fail)
    assert isinstance(CliRunner().invoke(main, ["inspect", "x"]).exception, RuntimeError)


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


# `robx`, whose `students` prints its table without building the networks.
ROBX = """
import click, robx.cli as cli
from robx.console import print_table
@click.command()
def students():
    print_table(("student",), [("resnet18",)])
find = cli.LazyGroup.get_command
cli.LazyGroup.get_command = lambda *given: students if given[-1] == "students" else find(*given)
cli.main()
"""


def robx(*arguments: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """Run robx by a shell that redirects its streams."""
    command = f'"{sys.executable}" -c "$0" {" ".join(arguments)} {redirect}'
    return subprocess.run(["sh", "-c", command, ROBX], capture_output=True, text=True, timeout=120)


def test_a_closed_standard_output_is_reported_on_standard_error() -> None:
    done = robx("students", redirect=">&-")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "robx: standard output is closed: what the command printed is lost\n"
    done = robx("inspect", "none", redirect=">&-")  # nothing was to be printed
    assert done.returncode == 2 and "none" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line_and_status_1() -> None:
    done = robx("students", redirect=">/dev/full")
    assert done.returncode == 1, done.stderr
    assert done.stderr == "robx: No space left on device: free some space and run the same command again\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoSpace("no space left to write x: free some space"), 1),
        (ArtifactError("the student cannot be exported (No space left on device): choose another student"), 1),
        (InputError("another error"), 2),
    ],
)
def test_no_space_is_status_1_whoever_reports_it(
    monkeypatch: pytest.MonkeyPatch, error: RobxError, status: int
) -> None:
    def fail(path: object) -> None:
        raise error from (RuntimeError("I/O error: No space left on device (os error 28)") if status == 1 else None)

    monkeypatch.setattr("robx.records.load_bundle", fail)
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert result.exit_code == status and result.stderr == f"robx: {error}\n"


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_without_standard_error_nothing_is_lost(redirect: str) -> None:
    done = robx("students", redirect=redirect)
    assert done.returncode == 0 and "resnet18" in done.stdout
    assert robx("inspect", "none", redirect=redirect).returncode == 2
    assert robx("students", redirect=f"{redirect} >&-").returncode == 1


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import sys, click, robx.cli as cli\n"
        "@click.command()\n"
        "def probe():\n"
        f"    file = open({str(tmp_path / 'model')!r}, 'w'); assert file.fileno() > 2; print('x'); file.close()\n"
        "cli.LazyGroup.get_command = lambda *_: probe\n"
        "cli.main(['inspect'])"
    )
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" >&- 2>&- <&-', code], timeout=120)
    assert done.returncode == 1 and (tmp_path / "model").read_text() == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away(stream: str) -> None:
    """If it read standard output, the command ends with one line; if standard error, it goes on."""
    code = (
        "import sys, click, robx.cli as cli\n"
        "from robx.console import say\n"
        "@click.command()\n"
        "def probe():\n"
        "    for n in range(20000):\n"
        f"        click.echo('line') if {stream!r} == 'stdout' else say('line')\n"
        "    print('done')\n"
        "cli.LazyGroup.get_command = lambda *_: probe\n"
        "cli.main(['inspect'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    closed, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
    assert closed is not None and other is not None
    closed.close()
    text = other.read()
    if stream == "stdout":
        assert process.wait(120) == 1
        assert text == "robx: standard output was closed by the program that reads it: stopped\n"
    else:
        assert process.wait(120) == 0 and text == "done\n"
