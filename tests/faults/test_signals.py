"""Signals to real processes with workers alive."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.preloaded import Preloaded, Process

HERE = Path(__file__).parent
TINY = HERE.parent / "distill" / "tiny.py"
SECONDS = 240


def start(preloaded: Preloaded, *command: object, **options: object) -> Process:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{TINY.parent}:{TINY.parents[2]}",
        "TINY_OPTIONS": json.dumps(options),
    }
    return preloaded.start(command, env=environment, new_session=True)


def wait_for_workers(process: Process, count: int) -> list[psutil.Process]:
    for _ in range(SECONDS * 10):
        children = psutil.Process(process.pid).children()
        if len(children) >= count:
            return children
        time.sleep(0.1)
    pytest.fail("no workers were started")


def test_a_second_interrupt_ends_a_run_whose_workers_hang(tmp_path: Path, preloaded: Preloaded) -> None:
    process = start(preloaded, HERE / "hanging.py", tmp_path / "run")
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


def test_sigterm_ends_a_run_that_waits_for_an_image(tmp_path: Path, preloaded: Preloaded) -> None:
    process = start(preloaded, HERE / "hanging.py", tmp_path / "run")
    try:
        workers = wait_for_workers(process, 2)
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75 and "SIGTERM after step 0 of 2, while no image arrived" in errors
        assert "Traceback" not in errors
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    finally:
        process.kill()


def test_a_batch_that_cannot_be_handed_over_ends_the_run_in_one_line(tmp_path: Path, preloaded: Preloaded) -> None:
    process = start(preloaded, HERE / "hanging.py", tmp_path / "run", "lost")
    try:
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 2 and errors.count("\n") == 1, errors
        assert "could not hand over its batch" in errors and "--shm-size" in errors
    finally:
        process.kill()


def test_too_few_open_files_for_the_workers_are_refused(scenes: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    limit = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30)); "
             "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")  # fmt: skip
    process = start(preloaded, "-c", limit, TINY, scenes, tmp_path / "run", workers=2)
    try:
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 2 and errors.count("\n") == 1, errors
        assert "2 loader workers need up to 160 open files, but the limit is 30" in errors
    finally:
        process.kill()
