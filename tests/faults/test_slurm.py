"""docs/distill.sbatch, run by bash with stand-ins for SLURM's two commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from torch.distributed.run import get_args_parser

from robx.distill.commands import distill
from robx.distill.training import run_checkpoint

SCRIPT = Path(__file__).parents[2] / "docs" / "distill.sbatch"
SECONDS = 240
# As srun does, they pass signals on to what they start.
SRUN = """#!/bin/bash
"$@" & child=$!
trap 'kill -USR1 $child' USR1
wait $child; status=$?
[ $status -eq 138 ] && { wait $child; status=$?; }
exit $status
"""
SCONTROL = """#!/bin/bash
case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" >> "$REQUEUED" ;; esac
"""
TINY = (
    *("--teacher", "ema", "--objective", "swav", "--student", "test_vit", "--device", "cpu", "--workers", "0"),
    *("--crop-size", "32", "--local-crop-size", "16", "--local-crops", "1", "--batch-size", "8", "--prototypes", "8"),
    *("--log-every", "1"),
)


def test_its_syntax_and_flags_are_those_of_bash_torchrun_and_robx() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True).stderr == ""
    command = re.search(r"^srun torchrun (.*?) & *$|^srun torchrun (.*?)&\n", SCRIPT.read_text(), re.M | re.S)
    assert command is not None
    torchrun, robx = command[0].split("-m robx.cli distill")
    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert len(flags := re.findall(r"--[a-z-]+", torchrun)) == 6 and set(flags) <= known
    defaults = re.search(r"^workers=\((.*)\)$", SCRIPT.read_text(), re.M)
    assert defaults is not None and '"${workers[@]}" "$@"' in robx
    assert set(re.findall(r"--[a-z-]+", defaults[1])) == {"--workers"} <= {o for p in distill.params for o in p.opts}
    example = re.search(r"sbatch docs/distill\.sbatch (.*)", SCRIPT.read_text())
    assert example is not None and distill.make_context("distill", example[1].split()) is not None


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "2"}
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | job | {"PATH": path, "REQUEUED": str(tmp_path / "requeued"), "OMP_NUM_THREADS": "1"}


def submit(slurm: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=slurm, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_before_the_time_limit_the_job_goes_back_into_the_queue_and_the_same_command_goes_on(
    slurm: dict[str, str], scenes: Path, tmp_path: Path, robx: Callable[..., Result]
) -> None:
    arguments = (*TINY, "--epochs", 16, "--data", scenes, "--out", tmp_path / "run")
    job = submit(slurm, *arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=SECONDS)
    assert job.returncode != 0 and "SIGUSR1 after step" in said, said
    assert (tmp_path / "requeued").read_text() == "17\n"
    found = run_checkpoint.load_newest(tmp_path / "run")
    assert found is not None and 3 < found[0] < 128
    again = robx("distill", *arguments)
    assert again.exit_code == 0 and f"resuming {tmp_path / 'run'} after step {found[0]} of 128" in again.stderr


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_stays_ended(slurm: dict[str, str], tmp_path: Path, status: int) -> None:
    fake = tmp_path / "bin" / "torchrun"
    fake.write_text(f'#!/bin/bash\necho "$@"\nexit {status}\n')
    fake.chmod(0o755)
    job = submit(slurm | {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}, "--student", "a b")
    given, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == status and not (tmp_path / "requeued").exists()
    assert "--nproc-per-node 4" in given and given.endswith("-m robx.cli distill --workers 7 --student a b\n")


@pytest.mark.parametrize("own", [("--workers", "2"), ("--workers=2",)])
def test_the_number_of_workers_may_be_given(slurm: dict[str, str], tmp_path: Path, own: tuple[str, ...]) -> None:
    fake = tmp_path / "bin" / "torchrun"
    fake.write_text('#!/bin/bash\necho "$@"\n')
    fake.chmod(0o755)
    given, _ = submit(slurm, *own, "--seed", "1").communicate(timeout=SECONDS)
    assert given.endswith(f"-m robx.cli distill {' '.join(own)} --seed 1\n")
