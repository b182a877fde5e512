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

from robx.distill.training import run_checkpoint
from robx.distill.training.processes import Processes, pick_device
from robx.errors import InputError
from robx.images.sources import open_source
from tests.preloaded import Preloaded, Process

SCRIPT = Path(__file__).parents[1] / "tiny.py"
SECONDS = 240


def start(preloaded: Preloaded, data: Path, out: Path, *values: str, **options: object) -> Process:
    environment = os.environ | {"TINY_OPTIONS": json.dumps(options), "OMP_NUM_THREADS": "1"}
    return preloaded.start([SCRIPT, data, out, *values], env=environment)


def wait_for_step(process: Process, step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            return
    pytest.fail(f"it ended before step {step}: {process.communicate(timeout=SECONDS)[1]}")


def end(process: Process | subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, errors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def test_killed_then_asked_to_end_then_resumed_it_is_the_unbroken_run(
    tiny: ModuleType, scenes: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    epochs = "epochs=3"
    # SIGKILL with a worker alive, soon after a checkpoint.
    process = start(preloaded, scenes, tmp_path / "run", epochs, checkpoint_steps=3, workers=1)
    wait_for_step(process, 7)  # the save of step 6 has waited for that of step 3
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    found = run_checkpoint.load_newest(tmp_path / "run")
    assert found is not None and found[0] % 3 == 0

    # SIGTERM to the resumed run and all its children, as a scheduler sends it.
    process = start(preloaded, scenes, tmp_path / "run", epochs, workers=1)
    wait_for_step(process, found[0] + 2)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.terminate()
    process.terminate()
    status, errors = end(process)
    assert status == 75 and "SIGTERM after step" in errors and "Traceback" not in errors
    after = run_checkpoint.load_newest(tmp_path / "run")
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
    assert killed and any("restarting the loader" in text for text in said)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


SECOND_INTERRUPT = """
import os, signal
from robx.distill.training.signals import stop_on_signals
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


def test_a_second_interrupt_ends_it_at_once(preloaded: Preloaded) -> None:
    """In a process of its own: a test runner's worker may run tests beside its main thread, which takes the signals."""
    _, said, errors = preloaded.run(["-c", SECOND_INTERRUPT])
    assert said.split() == ["True", "True", "True"], errors


def test_two_processes_learn_what_one_does(
    tiny: ModuleType, scenes: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    """With the environment that torchrun gives them; the soak tests start torchrun itself."""
    command = [SCRIPT, scenes, tmp_path / "two", "drop_path=0.0", 'optimizer="sgd"', "lr=0.1"]
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    ranks = [preloaded.start(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    ended = [end(rank) for rank in ranks]
    assert [status for status, _ in ended] == [0, 0], ended
    recipe = tiny.tiny_recipe(drop_path=0.0, optimizer="sgd", lr=0.1)
    tiny.tiny_run(open_source(scenes), tmp_path / "one", recipe=recipe)
    pairs = list(zip(tiny.losses(tmp_path / "two"), tiny.losses(tmp_path / "one"), strict=True))
    assert len(pairs) == 8 and all(abs(a - b) < 1e-5 for (_, a), (_, b) in pairs)
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4)


class _Stop(Exception):
    pass


def test_a_run_of_one_process_goes_on_in_two(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    """The same crops, and the losses of the unbroken run to 1e-5 (no BatchNorm, no drop path)."""

    def stop(done: int, total: int, note: str) -> None:
        if done == 4:
            raise _Stop

    recipe, source = tiny.tiny_recipe(drop_path=0.0, lr=1e-4, patch_drop=0.0), open_source(scenes)
    tiny.tiny_run(source, tmp_path / "unbroken", recipe=recipe)
    with pytest.raises(_Stop):
        tiny.tiny_run(source, tmp_path / "run", recipe=recipe, options={"checkpoint_steps": 3}, progress=stop)
    values = ("drop_path=0.0", "lr=1e-4", "patch_drop=0.0")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    command = [sys.executable, *launcher, SCRIPT, scenes, tmp_path / "run", *values]
    status, errors = end(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert status == 0, errors
    pairs = list(zip(tiny.losses(tmp_path / "run"), tiny.losses(tmp_path / "unbroken"), strict=True))
    assert [a for (a, _), _ in pairs] == list(range(1, 9)) and all(abs(a - b) < 1e-5 for (_, a), (_, b) in pairs)


NODE = """
import dataclasses, sys
import torch
import torch.distributed as dist
from robx.distill.training.networks import share_teacher
from robx.distill.training.processes import Processes
from robx.distill.teachers.load import build_teacher_skeleton
from robx.errors import InputError

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
processes = Processes(rank, 2, torch.device("cpu"), control=dist.new_group(backend="gloo"))
torch.manual_seed(rank)  # each node fits its own
teacher = build_teacher_skeleton("timm:test_resnet", objective="msn", prototypes=12, image_size=32)
before = teacher.head.prototypes.clone()
share_teacher(teacher, processes)
torch.save((before, teacher.head.prototypes, teacher.head.mean), f"{folder}/{rank}.pt")
teacher.info = dataclasses.replace(teacher.info, sha256=f"{rank}" * 64)
try:
    share_teacher(teacher, processes)
except InputError as error:
    print(error)
dist.destroy_process_group()
"""


def test_nodes_learn_from_one_teacher(tmp_path: Path, preloaded: Preloaded) -> None:
    running = [preloaded.start(["-c", NODE, tmp_path, rank]) for rank in range(2)]
    said = [process.communicate(timeout=SECONDS)[0] for process in running]
    assert all("different weights of timm:test_resnet (sha256 000000000000, 111111111111)" in text for text in said)
    (first, mine, mean), (other, theirs, their_mean) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(first, other)
    assert torch.equal(mine, first) and torch.equal(theirs, first) and torch.equal(mean, their_mean)


@pytest.mark.parametrize(
    ("world", "device", "synchronised"), [(2, "cuda", True), (2, "cpu", False), (1, "cuda", False)]
)
def test_batch_norm_is_synchronised_between_gpus(world: int, device: str, synchronised: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    found = Processes(0, world, torch.device(device)).synchronised(net)
    assert found is net and isinstance(net[1], torch.nn.SyncBatchNorm) is synchronised


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_one_short_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def without_driver(*_: object, **__: object) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you ... http://www.nvidia.com")

    monkeypatch.setattr(torch, "empty", without_driver)
    with pytest.raises(InputError, match=f"--device {name} cannot be used .no usable NVIDIA GPU") as caught:
        pick_device(name)
    assert "http" not in str(caught.value) and len(str(caught.value)) < 120
