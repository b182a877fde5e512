"""Signals to real processes with workers alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
TINY = HERE.parent / "distill" / "tiny.py"
SECONDS = 240


def start(*command: object, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{TINY.parent}:{TINY.parents[2]}",
        "TINY_OPTIONS": json.dumps(options),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_for_workers(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    for _ in range(SECONDS * 10):
        children = psutil.Process(process.pid).children()
        if len(children) >= count:
            return children
        time.sleep(0.1)
    pytest.fail("no workers were started")


def test_a_second_interrupt_ends_a_run_whose_workers_hang(tmp_path: Path) -> None:
    process = start(HERE / "hanging.py", tmp_path / "run")
    try:
        workers = wait_for_workers(process, 2)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the step"
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode != 0 and "KeyboardInterrupt" in errors
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    finally:
        process.kill()
