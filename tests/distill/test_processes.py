"""Real processes: killed, asked to end, and several of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from safetensors.torch import load_file

from robx.distill import resume
from robx.distill.processes import Processes
from robx.sources import open_source

SCRIPT = Path(__file__).with_name("tiny.py")
SECONDS = 240


def start(
    data: Path, out: Path, *values: str, launcher: tuple[str, ...] = (), **options: object
) -> subprocess.Popen[str]:
    environment = os.environ | {"TINY_OPTIONS": json.dumps(options), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(data), str(out), *values]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            return
    pytest.fail(f"it ended before step {step}: {process.communicate(timeout=SECONDS)[1]}")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, errors


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def test_killed_then_asked_to_end_then_resumed_it_is_the_unbroken_run(
    tiny: ModuleType, scenes: Path, tmp_path: Path
) -> None:
    epochs = "epochs=3"
    # SIGKILL with a worker alive, soon after a checkpoint.
    process = start(scenes, tmp_path / "run", epochs, checkpoint_steps=3, workers=1)
    wait_for_step(process, 5)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    found = resume.load_newest(tmp_path / "run")
    assert found is not None and found[0] % 3 == 0

    # SIGTERM to the resumed run and all its children, as a scheduler sends it.
    process = start(scenes, tmp_path / "run", epochs, workers=1)
    wait_for_step(process, found[0] + 2)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.terminate()
    process.terminate()
    status, errors = end(process)
    assert status == 75 and "SIGTERM after step" in errors and "Traceback" not in errors
    after = resume.load_newest(tmp_path / "run")
    assert after is not None and after[0] >= found[0] + 2

    tiny.tiny_run(open_source(scenes), tmp_path / "run", recipe=tiny.tiny_recipe(epochs=3))
    tiny.tiny_run(open_source(scenes), tmp_path / "unbroken", recipe=tiny.tiny_recipe(epochs=3))
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    assert tiny.losses(tmp_path / "run") == tiny.losses(tmp_path / "unbroken")


def test_a_killed_worker_is_replaced_and_nothing_changes(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    killed, said = [], []
    others = set(psutil.Process().children())  # of earlier tests

    def progress(done: int, total: int, note: str) -> None:
        children = [child for child in psutil.Process().children() if child not in others]
        if done == 2 and not killed:
            victim = next(child for child in children if child.name().startswith(("python", "pt_data", "pytest")))
            victim.kill()
            killed.append(victim.pid)

    source = open_source(scenes)
    recipe = tiny.tiny_recipe(epochs=2)
    tiny.tiny_run(source, tmp_path / "a", recipe=recipe, options={"workers": 1}, progress=progress, say=said.append)
    tiny.tiny_run(source, tmp_path / "b", recipe=recipe)
    assert killed and any("starting the loader once more" in text for text in said)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


SECOND_INTERRUPT = """
import os, signal
from robx.distill.interrupts import stop_on_signals
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    first = stop.signal is signal.SIGINT
    try:
        os.kill(os.getpid(), signal.SIGINT)
        second = False
    except KeyboardInterrupt:
        second = True
print(first, second, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_a_second_interrupt_ends_it_at_once() -> None:
    """In a process of its own: a test runner's worker may run tests beside its main thread, which takes the signals."""
    done = subprocess.run([sys.executable, "-c", SECOND_INTERRUPT], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr


def test_two_processes_learn_what_one_does(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    values = ("drop_path=0.0", 'optimizer="sgd"', "lr=0.1")
    process = start(scenes, tmp_path / "two", *values, launcher=launcher)
    status, errors = end(process)
    assert status == 0, errors
    recipe = tiny.tiny_recipe(drop_path=0.0, optimizer="sgd", lr=0.1)
    tiny.tiny_run(open_source(scenes), tmp_path / "one", recipe=recipe)
    pairs = list(zip(tiny.losses(tmp_path / "two"), tiny.losses(tmp_path / "one"), strict=True))
    assert len(pairs) == 8 and all(abs(a - b) < 1e-5 for (_, a), (_, b) in pairs)
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("world", "device", "synchronised"), [(2, "cuda", True), (2, "cpu", False), (1, "cuda", False)]
)
def test_batch_norm_is_synchronised_between_gpus(world: int, device: str, synchronised: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    found = Processes(0, world, torch.device(device)).synchronised(net)
    assert found is net and isinstance(net[1], torch.nn.SyncBatchNorm) is synchronised
