"""What the tests of faults share: whole tiny runs, a server that runs and kills them, and the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from robx.cli import main
from tests.preloaded import Preloaded

HERE = Path(__file__).parent
TINY = HERE.parent / "distill" / "tiny.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TINY.parent}:{TINY.parents[2]}"}


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/distill/tiny.py: whole runs in a second."""
    return _load("tiny", TINY)


@pytest.fixture(scope="session")
def runtime_models() -> ModuleType:
    """tests/runtime/conftest.py: how a real bundle around one convolution is made."""
    return _load("runtime_models", HERE.parent / "runtime" / "conftest.py")


@pytest.fixture
def make_bundle(runtime_models: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """As that of tests/runtime."""
    make: Callable[..., Path] = runtime_models.make_bundle.__wrapped__(tmp_path)
    return make


class Answering:
    """A script of this folder as one process, with everything imported, that answers requests: JSON, a line each."""

    def __init__(self, script: str, preloaded: Preloaded) -> None:
        self._process = preloaded.start([HERE / script], env=os.environ | ENVIRONMENT)

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to one request."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait(timeout=30)


class Shell(Answering):
    """shell.py: robx commands as processes of their own."""

    def __call__(self, folder: Path, *arguments: object) -> tuple[int, str, str]:
        """Run one command in `folder`: (exit status, standard output, standard error)."""
        return self.together(folder, arguments)[0]

    def together(self, folder: Path, *commands: Sequence[object], **more: Any) -> list[tuple[int, str, str]]:
        """Run several at once; kill=PATTERN kills the first when such a path appears below `folder`."""
        plain = [[str(a) for a in command] for command in commands]
        return [tuple(answer) for answer in self.ask({"commands": plain, "folder": str(folder)} | more)]


@pytest.fixture(scope="session")
def shell(preloaded: Preloaded) -> Iterator[Shell]:
    """The one Shell."""
    shell = Shell("shell.py", preloaded)
    yield shell
    shell.close()


class Server(Answering):
    """killer.py: it forks a run for every request."""

    def run(self, data: Path, out: Path, *, die: dict[str, Any] | None = None, **more: Any) -> tuple[int, str]:
        """(exit status, what the run said); a negative status is the signal that ended it."""
        answer = self.ask({"data": str(data), "out": str(out), "die": die or {}} | more)
        return answer["status"], answer["said"]


@pytest.fixture(scope="session")
def server(preloaded: Preloaded) -> Iterator[Server]:
    """The one Server."""
    server = Server("killer.py", preloaded)
    yield server
    server.close()


def robx(*arguments: object) -> Result:
    """The command line in this process: what it does not catch is raised."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(name="robx")
def robx_fixture() -> Callable[..., Result]:
    """`robx(...)`."""
    return robx


def _load(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
