"""Run robx commands as processes that start in no time: requests (JSON) a line in, answers a line out.

A request is {"commands": [[argument, ...], ...], "folder": cwd}: a fork each, all at once. "kill": pattern kills the
first with SIGKILL as soon as a path below the folder matches. The answer has (status, stdout, stderr) of each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

# Imported once, for all forks; no engine: their threads would not survive one.
import onnx  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch

from robx.cli import main
from robx.runtime.bench.profiles import PROFILES
from tests.once_exported import OnceExported

PROFILES["rapid"] = dataclasses.replace(PROFILES["rapid"], seconds=0.4, warm_up_limit=0.1)
torch.onnx.export = OnceExported(torch.onnx.export, Path(os.environ["EXPORTED_ONCE"]))  # type: ignore[assignment]


def _start(command: list[str], folder: str) -> tuple[int, tuple[IO[bytes], IO[bytes]]]:
    out, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        os.chdir(folder)
        os.setpgid(0, 0)
        status = 1
        try:
            main(command, prog_name="robx")
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child, (out, errors)


def _answer(request: dict[str, Any]) -> list[tuple[int, str, str]]:
    children = [_start(command, request["folder"]) for command in request["commands"]]
    if "kill" in request:
        while not any(Path(request["folder"]).rglob(request["kill"])):
            time.sleep(0.005)
        os.kill(children[0][0], signal.SIGKILL)
    answers = []
    for child, files in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = []
        for file in files:
            file.seek(0)
            said.append(file.read().decode("utf-8", "surrogateescape"))
            file.close()
        answers.append((status, said[0], said[1]))
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
