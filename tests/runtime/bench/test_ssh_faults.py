"""A device over a real sshd with a full or read-only disk, and interrupted benchmarks: nothing is left behind.

The device's disk is a tmpfs in a mount namespace of its sshd's own, which an unprivileged user may not have.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MOUNTS = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(
    not MOUNTS, reason="this user may not mount a tmpfs in a namespace of its own: run as root"
)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def python_after(tmp_path, commands):
    """A Python command that first runs a line of shell in the job's folder."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n{commands}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def assert_one_line(done, said):
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if not line.startswith("meas")]  # its progress
    assert len(lines) == 1 and said in lines[0], done.stderr


ONE = ("--processes", 1)  # is enough where all would fail


def listing(address, folder):
    """The device's files in `folder`, listed over another connection."""
    host, _, port = address.removeprefix("ssh://").rpartition(":")
    return subprocess.run(["ssh", "-p", port, host, f"ls {folder}"], capture_output=True, text=True, check=True).stdout


@needs_mounts
def test_a_disk_without_room_for_the_bundle(call, start_sshd, disk, make_bundle, short_profile):
    address = start_sshd(disk, f"mount -t tmpfs -o size=256k none {disk}")
    folder = make_bundle()
    done = call("bench", folder, "--device", address, "--python", sys.executable, "--profile", "rapid")
    assert_one_line(done, f"copying to {address} failed")
    assert listing(address, disk) == "" and not (folder / "measurements.jsonl").exists()


@needs_mounts
def test_a_disk_that_is_full_when_the_result_is_written(call, start_sshd, disk, make_bundle, short_profile, tmp_path):
    address = start_sshd(disk, f"mount -t tmpfs -o size=4m none {disk}")
    python = python_after(tmp_path, "cat /dev/zero > filling 2> /dev/null")
    folder = make_bundle()
    done = call("bench", folder, "--device", address, "--python", python, "--profile", "rapid", *ONE)
    assert_one_line(done, "No space left on device")
    assert listing(address, disk) == "" and not (folder / "measurements.jsonl").exists()


@needs_mounts
def test_a_read_only_disk(call, start_sshd, disk, make_bundle, short_profile):
    address = start_sshd(disk, f"mount -t tmpfs none {disk} && mount -o remount,ro {disk}")
    done = call("bench", make_bundle(), "--device", address, "--python", sys.executable, "--profile", "rapid")
    assert_one_line(done, "Read-only file system")
    assert "creating a folder" in done.stderr


@needs_mounts
def test_a_disk_that_becomes_read_only(call, start_sshd, disk, make_bundle, short_profile, tmp_path):
    address = start_sshd(disk, f"mount -t tmpfs none {disk}")
    python = python_after(tmp_path, f"mount -o remount,ro {disk}")
    folder = make_bundle()
    done = call("bench", folder, "--device", address, "--python", python, "--profile", "rapid", *ONE)
    assert_one_line(done, "Read-only file system")
    assert not (folder / "measurements.jsonl").exists()


def test_a_runner_killed_by_the_device(call, start_sshd, disk, make_bundle, short_profile, tmp_path):
    python = python_after(tmp_path, "kill -KILL $$")
    for address in (start_sshd(disk), "local"):
        done = call(
            "bench", make_bundle(address[:3]), "--device", address, "--python", python, "--profile", "rapid", *ONE
        )
        assert_one_line(done, "the runner ended by SIGKILL (killed, typically for lack of memory)")
    assert list(disk.iterdir()) == []


def runners(folder):
    """The processes of a runner whose temporary folder is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
            if ours and b"robx_runner.pyz" in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_bench_leaves_nothing_on_the_device(start_sshd, disk, make_bundle, number):
    address, folder = start_sshd(disk), make_bundle()
    command = [sys.executable, "-m", "robx.cli", "bench", folder, "--device", address, "--python", sys.executable]
    # A shell's background job ignores SIGINT, and so would its children.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen([*map(str, command), "--profile", "standard"], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, deaf)
    with started as bench:
        try:
            wait_until(lambda: list(disk.glob("robx-*/b0/telemetry.jsonl")))
            assert runners(disk)
            os.kill(bench.pid, number)
            _, said = bench.communicate(timeout=120)
        finally:
            bench.kill()
    assert bench.returncode == 75 and "Traceback" not in said
    assert f"interrupted by {number.name}: run the same command again" in said
    assert list(disk.iterdir()) == []
    wait_until(lambda: not runners(disk), seconds=30)
    assert not (folder / "measurements.jsonl").exists()
