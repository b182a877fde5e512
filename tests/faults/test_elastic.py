"""torchrun's elastic restart: a rank that is killed costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from robx.distill.training import run_checkpoint

HERE = Path(__file__).parent


def test_a_rank_is_killed_and_the_restarted_run_is_the_unbroken_one(
    tiny: ModuleType, scenes: Path, tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent / 'distill'}:{HERE.parent.parent}"}
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "elastic.py"), str(scenes), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    resumed = [line.split()[-3] for line in done.stdout.splitlines() if line.startswith("resuming")]
    assert resumed == ["4"], done.stdout
    # The other one says what happened in a line, and goes by itself: torchrun would kill it after half a minute.
    assert "another process of the run ended before this one, 0 of 2" in done.stderr
    assert "Traceback" not in done.stderr and "forcefully" not in done.stderr
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    assert (killed / "student.safetensors").read_bytes() == (unbroken / "student.safetensors").read_bytes()
    assert tiny.losses(killed) == tiny.losses(unbroken) and len(tiny.losses(killed)) == 16
    for name in ("state.json", "state.safetensors"):  # optimiser and counters too
        state, expected = (run_checkpoint.checkpoints(run)[-1] / name for run in (killed, unbroken))
        assert state.read_bytes() == expected.read_bytes()
