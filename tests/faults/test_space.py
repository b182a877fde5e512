"""File systems that are full (exit status 1), read-only or gone (2): one line, and the old checkpoint intact.

The mounts live in a mount namespace of the test's own, which an unprivileged user may not have: then they are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robx.distill.training import run_checkpoint
from robx.records import load_student
from robx.store.written import Written

TINY = Path(__file__).parents[1] / "distill" / "tiny.py"
MOUNTS = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(
    not MOUNTS, reason="this user may not mount a tmpfs in a namespace of its own: run as root"
)


def shell(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace; $1 ... are the arguments."""
    more = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "TINY": str(TINY)} | environment
    command = ["unshare", "-m", "sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | more)


def assert_one_line(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == (1 if "space" in said else 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if said in line]
    assert len(lines) == 1, done.stderr


@needs_mounts
@pytest.mark.parametrize("megabytes", [7, 9, 11, 13])
def test_a_disk_that_fills_up_during_training(scenes: Path, tmp_path: Path, megabytes: int) -> None:
    (tmp_path / "disk").mkdir()
    done = shell(
        'mount -t tmpfs -o size=$3m none "$2"; "$PYTHON" "$TINY" "$1" "$2/run" epochs=4; status=$?; '
        'cp -r "$2" "$2-after"; exit $status',
        *(scenes, tmp_path / "disk", megabytes),
        TINY_OPTIONS='{"checkpoint_steps": 2, "keep": 100}',
    )
    assert_one_line(done, "space")
    assert_intact(tmp_path / "disk-after" / "run")


def assert_intact(run: Path) -> None:
    said: list[str] = []
    found = run_checkpoint.load_newest(run, say=said.append)
    assert not said and (found is None or found[0] > 0)
    assert not [p for p in run.rglob("*") if ".tmp" in p.name or ".old" in p.name]
    if found is not None:
        load_student(run)


@needs_mounts
def test_a_disk_that_becomes_read_only(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    done = shell(
        'mount -t tmpfs none "$2"; "$PYTHON" "$TINY" "$1" "$2/run" epochs=1 && mount -o remount,ro "$2" && '
        '"$PYTHON" "$TINY" "$1" "$2/run" epochs=2; status=$?; cp -r "$2" "$2-after"; exit $status',
        *(scenes, tmp_path / "disk"),
    )
    assert_one_line(done, "cannot be written (Read-only file system)")
    assert_intact(tmp_path / "disk-after" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_metrics_that_cannot_be_written(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    Written(tmp_path / "run").adopt("metrics.jsonl")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TINY), str(scenes), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert_one_line(done, "no space left to write")


def test_a_folder_that_vanishes_and_a_file_in_its_place(scenes: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TINY), str(scenes), str(tmp_path / "run"), "epochs=40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        (tmp_path / "run").rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 2 and "Traceback" not in errors and "cannot be written" in errors
    (tmp_path / "run").write_text("a file")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert_one_line(done, "cannot be written")
