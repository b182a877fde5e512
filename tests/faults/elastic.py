"""What torchrun starts: a run unbroken, then the same whose rank 1 is killed after step 5. elastic.py DATA OUT"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import tiny
import torch

from robx.distill.training.processes import join_processes
from robx.errors import RobxError
from robx.images.sources import open_source


def main() -> None:
    torch.set_num_threads(1)
    source, out = open_source(Path(sys.argv[1])), Path(sys.argv[2])
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with join_processes("cpu") as processes:
        pids = processes.gather(os.getpid())

        def progress(done: int, total: int, note: str) -> None:
            if done == 5 and first_attempt:
                os.kill(pids[1], signal.SIGKILL)

        # SwAV's queue is each process's own.
        recipe = tiny.tiny_recipe(objective="swav", queue=8, epochs=2)
        settings = {"recipe": recipe, "processes": processes}
        tiny.tiny_run(source, out / "unbroken", **settings)
        options = {"checkpoint_steps": 2, "workers": 1}
        tiny.tiny_run(source, out / "killed", **settings, options=options, progress=progress, say=tell)


def tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except RobxError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
