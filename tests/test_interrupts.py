"""A signal ends a command with one line and exit status 75, whatever a library makes of it; real processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.preloaded import Preloaded

# A command in the place of a real one, which writes "ready" and waits to be interrupted.
PROBE = """
import signal, sys, time
import click, robx.cli as cli
from robx.console import progress_bar
from robx.errors import InputError

def wait():
    print("ready", flush=True)
    for _ in range(6000):  # Python would not notice until its end a signal that arrives just before a long sleep
        time.sleep(0.01)

@click.command()
def probe():
    {body}

cli.LazyGroup.get_command = lambda *_: probe
cli.main([{verb!r}])
"""
BODIES = {
    "plain": "wait()",
    "blamed on the model": """
    try:
        wait()
    except BaseException as error:
        raise InputError("resnet10t cannot be exported (Error calling __set_name__): choose another") from error""",
    "a defect": """
    try:
        wait()
    except BaseException:
        raise RuntimeError("Error calling __set_name__")""",
    "swallowed, then progress": """
    try:
        wait()
    except BaseException:
        pass
    with progress_bar() as progress:
        progress(0, 1, "next")
        print("went on", flush=True)""",
    "swallowed until the end": """
    try:
        wait()
    except BaseException:
        pass""",
}


@pytest.mark.parametrize(
    ("how", "number", "verb", "remedy"),
    [
        ("plain", signal.SIGINT, "export", "run the same command to resume"),
        ("plain", signal.SIGTERM, "bench", "run the same command again"),
        ("plain", signal.SIGHUP, "eval", "run the same command again"),
        ("blamed on the model", signal.SIGINT, "export", "run the same command to resume"),
        ("a defect", signal.SIGTERM, "ship", "run the same command to resume"),
        ("swallowed, then progress", signal.SIGINT, "check", "run the same command again"),
        ("swallowed until the end", signal.SIGINT, "report", "run the same command again"),
    ],
)
def test_a_signal_is_reported_as_what_it_was(
    how: str, number: signal.Signals, verb: str, remedy: str, preloaded: Preloaded
) -> None:
    process = preloaded.start(["-c", PROBE.format(body=BODIES[how], verb=verb)])
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert errors == f"robx: interrupted by {number.name}: {remedy}\n" and out == ""
    finally:
        process.kill()


def test_a_real_export_ends_with_75_in_the_middle_of_its_work(preloaded: Preloaded, tmp_path: Path) -> None:
    """`robx export` that is interrupted while a library is imported, which turns that into an error of its own."""
    code = (
        "import os, signal, sys, robx.cli as cli, robx.export.build as build\n"
        "def broken(*_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for _ in range(10**9): pass\n"
        "    except KeyboardInterrupt as error:\n"
        "        raise RuntimeError('Error calling __set_name__') from error\n"
        "build._prepare = broken\n"
        f"cli.main(['export', {str(tmp_path)!r}, '--format', 'onnx'])"
    )
    status, out, errors = preloaded.run(["-c", code])
    assert status == 75 and out == "" and errors == "robx: interrupted by SIGINT: run the same command to resume\n"


def test_signals_that_are_ignored_stay_ignored(preloaded: Preloaded) -> None:
    code = """
import signal
from robx import interrupts
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with interrupts.ended_by_signals():
    print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    assert preloaded.run(["-c", code]) == (0, "True False\nTrue True\n", "")


def test_a_forked_child_ends_of_sigterm_as_it_would_have(preloaded: Preloaded) -> None:
    code = """
import os, signal, time
from robx import interrupts
reader, writer = os.pipe()
with interrupts.ended_by_signals():
    child = os.fork()
    if not child:
        os.write(writer, b"x")
        for _ in range(6000):
            time.sleep(0.01)
        os._exit(0)
    os.read(reader, 1)  # Python forgets the signals that arrive while it forks
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), interrupts.arrived())
"""
    assert preloaded.run(["-c", code]) == (0, f"-{signal.SIGTERM:d} None\n", "")


def test_a_deferred_signal_arrives_after_the_block(preloaded: Preloaded) -> None:
    code = """
import signal
from robx import interrupts
with interrupts.ended_by_signals():
    try:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGTERM)
            print("the rest of the step")
    except KeyboardInterrupt:
        print(interrupts.arrived().name)
"""
    assert preloaded.run(["-c", code]) == (0, "the rest of the step\nSIGTERM\n", "")
