"""The house stays the house: who imports whom, who prints, where links point, what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("distill", "export", "runtime", "eval")
# (stage, what it may import of another stage)
CROSSINGS = {
    "eval": ("robx.runtime.session",),
    "export/gate/gate.py": ("robx.runtime", "robx.eval"),
}
HEAVY = {"torch", "timm", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "numpy", "sklearn", "matplotlib"}
MODULES = sorted(p for folder in ("robx", *STAGES) for p in (ROOT / folder).glob("*.py"))
IDS = [str(p.relative_to(ROOT)) for p in MODULES]


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_stage_imports_no_other_stage(path: Path) -> None:
    stage = path.parent.name
    if stage == "robx":
        return
    allowed = CROSSINGS.get(stage, ()) + CROSSINGS.get(f"{stage}/{path.name}", ())
    for name in _imports(ast.parse(path.read_text())):
        other = name.split(".")[1] if name.startswith("robx.") and name.count(".") else ""
        if other in STAGES and other != stage:
            assert name.startswith(allowed) if allowed else False, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_only_commands_touch_click_or_print(path: Path) -> None:
    if path.name in ("commands.py", "cli.py", "demo.py", "console.py"):
        return
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in _imports(tree)} & {"click", "rich"}, f"{path.name} imports click or rich"
    if path.name == "runner.py":  # its output is its answer to the host
        return
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_no_assert_speaks_to_a_user(path: Path) -> None:
    asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not asserts, f"{path.name} asserts in lines {asserts}: raise a RobxError"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_link_and_its_init_a_docstring(stage: str) -> None:
    link = ROOT / "robx" / stage
    assert link.is_symlink() and link.readlink() == Path("..") / stage
    body = ast.parse((ROOT / stage / "__init__.py").read_text()).body
    assert len(body) == 1 and ast.get_docstring(ast.parse((ROOT / stage / "__init__.py").read_text()))


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_module_is_named_like_the_library_it_wraps() -> None:
    assert not {p.stem for p in MODULES} & (HEAVY | {"tensorrt", "ncnn"})


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = _modules_after(
        "from robx.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nsys.stdout = sys.__stdout__"
    )
    assert not loaded & (HEAVY | {"rich", "jinja2", "PIL"})


def test_the_help_of_every_command_loads_no_network_and_no_engine() -> None:
    loaded = _modules_after(
        "from robx.cli import COMMANDS, main\nfor command in COMMANDS:\n"
        "  try: main([command, '--help'])\n  except SystemExit: pass"
    )
    assert "click" in loaded and not loaded & (HEAVY - {"numpy"} | {"jinja2", "safetensors", "pandas"})


def test_the_records_need_the_standard_library_alone() -> None:
    assert not _modules_after("import robx.records") & (HEAVY | {"rich", "jinja2", "PIL", "click"})


def test_the_runtime_needs_neither_torch_nor_timm() -> None:
    loaded = _modules_after("import robx.runtime.session, robx.runtime.device.runner, robx.runtime.commands")
    assert not loaded & {"torch", "timm", "torchvision", "onnx", "nncf", "sklearn"}
