"""Run tiny distillations, each in a fork, and kill them: a request (JSON) a line in, an answer a line out.

``die`` says how: {"step": n, "after": s} is SIGKILL s seconds after step n; {"step": n, "bytes": k} lets the kernel
kill the process when it writes past byte k of any file after step n; {"trunk": n, "bytes": k} does so in the n-th save
of a student; {"call": "replace", "number": n} is SIGKILL at the n-th call of os.replace (or os.fsync, or os.open);
{"write": n, "after": s} holds the n-th checkpoint half-written in the background, and is SIGKILL s seconds later.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tiny
import torch

from robx.distill.training import run_checkpoint, run_state
from robx.errors import RobxError
from robx.images.sources import open_source


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    for line in sys.stdin:
        request = json.loads(line)
        said = tempfile.TemporaryFile()  # noqa: SIM115 (of the child, too)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os.dup2(said.fileno(), 2)
            _run(request, writer)
        os.close(writer)
        die = request["die"]
        reached = os.read(reader, 1)  # nothing when the run ended before
        if reached and "after" in die:
            time.sleep(die["after"])
            os.kill(child, signal.SIGKILL)
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        print(json.dumps({"status": status, "said": said.read().decode(errors="replace")}), flush=True)
        said.close()


def _run(request: dict[str, Any], reached: int) -> None:
    """In the fork; never returns."""
    die, status = request["die"], 1
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "call" in die:
        _lose_power(die["call"], die["number"])

    if "write" in die:
        _hold_write(die["write"], reached)

    if "trunk" in die:
        _bound_trunk(die["trunk"], die["bytes"])

    def progress(done: int, total: int, note: str) -> None:
        if done != die.get("step"):
            return
        if "bytes" in die:
            resource.setrlimit(resource.RLIMIT_FSIZE, (die["bytes"], die["bytes"]))
        else:
            os.write(reached, b".")

    try:
        tiny.tiny_run(
            open_source(Path(request["data"])),
            Path(request["out"]),
            recipe=tiny.tiny_recipe(**request.get("recipe", {})),
            options=request.get("options", {}),
            students=request.get("students", ["test_vit"]),
            progress=progress,
            store=Path(request["store"]) if "store" in request else None,
            say=lambda text: print(text, file=sys.stderr),
        )
        status = 0
    except RobxError as error:
        print(error, file=sys.stderr)
        status = error.exit_status
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _bound_trunk(number: int, limit: int) -> None:
    real, calls = run_state.save_weights, 0

    def bounded(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return real(*arguments)

    run_state.save_weights = bounded


def _hold_write(number: int, reached: int) -> None:
    real, calls = run_checkpoint._save, 0

    def held(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls < number:
            real(tensors, path)
            return
        path.write_bytes(bytes(100))
        os.write(reached, b".")
        time.sleep(600)

    run_checkpoint._save = held


def _lose_power(call: str, number: int) -> None:
    real, calls = getattr(os, call), 0

    def fatal(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, call, fatal)


if __name__ == "__main__":
    assert isinstance(sys.stdin, io.TextIOBase)
    main()
