"""The layout: which module may import which, who prints, where links point, and what is loaded when."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("distill", "export", "runtime", "eval")
# (stage or module, what it may import of another stage)
CROSSINGS = {
    "robx.eval": ("robx.runtime.session",),
    "robx.export.gate": ("robx.runtime", "robx.eval"),
}
# From low to high: a module imports only what stands before it or with it on the same line. A name is a module of the
# stage, or a room and all its modules.
LAYERS = {
    "robx": (
        ("errors", "progress", "interrupts", "console", "options", "random_state"),
        ("reporting",),
        ("store",),
        ("formats", "arguments"),
        ("records",),
        ("activation_bounds",),
        ("stats", "image_size", "trunk", "linear_head", "embeddings", "int8_simulation", "path_ends"),
        ("images",),
        ("golden",),
        ("api", "ship"),
        ("cli",),
        ("demo",),
    ),
    "distill": (
        ("recipes", "recipe_toml", "presets"),
        ("batches",),
        ("objectives", "students"),
        ("teachers",),
        ("targets",),
        ("training", "resolve"),
        ("train", "next_steps"),
        ("commands",),
    ),
    "export": (
        ("request", "quiet", "parity", "cache", "readme", "bundle_folder", "onnx_graph", "onnx_run", "image_splits"),
        ("int8",),
        ("formats", "heal"),
        ("float_network",),
        ("make",),
        ("gate",),
        ("build", "inspect_bundle"),
        ("commands",),
    ),
    "runtime": (
        ("device",),
        ("engines",),
        ("session",),
        ("bench",),
        ("check", "device_build", "infer", "doctor"),
        ("commands",),
    ),
    "eval": (
        ("neighbours",),
        ("ranks",),
        ("datasets",),
        ("protocols",),
        ("fidelity",),
        ("evaluate", "report"),
        ("commands",),
    ),
}
HEAVY = {"torch", "timm", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "numpy", "sklearn", "matplotlib"}


def _modules() -> dict[str, Path]:
    """Every module of robx by its dotted name."""
    found = {}
    for top in ("robx", *STAGES):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in {("robx", stage) for stage in STAGES}:  # a link to the stage's folder
                continue
            parts = parts if top == "robx" else ("robx", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
FILES = pytest.mark.parametrize("path", MODULES.values(), ids=[str(p.relative_to(ROOT)) for p in MODULES.values()])


def _imports(tree: ast.AST) -> Iterator[str]:
    """Imported names, those inside of functions and those given to import_module included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(given.value) for given in node.args if isinstance(given, ast.Constant))


def _module(name: str) -> str:
    """The module that the imported `name` is or lies in; empty for what is not of robx."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@functools.cache
def _graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    return {
        name: {_module(imported) for imported in _imports(ast.parse(path.read_text()))} - {"", "robx", name}
        for name, path in MODULES.items()
    }


def _place(module: str) -> tuple[str, str]:
    """(stage, room or top-level module) of a module; the second is empty for a stage's own __init__."""
    parts = [*module.split(".")[1:], "", ""]
    return (parts[0], parts[1]) if parts[0] in STAGES else ("robx", parts[0])


def _rank(stage: str, room: str) -> int:
    ranks = [i for i, layer in enumerate(LAYERS[stage]) if room in layer]
    assert len(ranks) == 1, f"{stage}/{room} has no place in LAYERS"
    return ranks[0]


@pytest.mark.parametrize("module", [m for m in MODULES if _place(m)[1]])
def test_a_module_imports_nothing_above_itself(module: str) -> None:
    stage, room = _place(module)
    above = [
        other
        for other in _graph()[module]
        if _place(other)[0] == stage and _place(other)[1] and _rank(stage, room) < _rank(*_place(other))
    ]
    # The command line, the API, plans and the demo stand on the stages; nothing else in robx/ does.
    if stage == "robx" and room not in ("cli", "api", "ship", "demo"):
        above += [other for other in _graph()[module] if _place(other)[0] != "robx"]
    assert not above, f"{module} imports {', '.join(above)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"circle: {' -> '.join((*path, module))}"
        if module not in state:
            state[module] = 1
            for other in sorted(_graph()[module]):
                visit(other, (*path, module))
            state[module] = 2

    for module in _graph():
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if _place(m)[0] != "robx"])
def test_a_stage_imports_no_other_stage(module: str) -> None:
    stage = _place(module)[0]
    allowed = tuple(name for key, names in CROSSINGS.items() if module.startswith(key) for name in names)
    for other in _graph()[module]:
        if _place(other)[0] not in ("robx", stage):
            assert other.startswith(allowed) if allowed else False, f"{module} imports {other}"


@FILES
def test_only_commands_touch_click_or_print(path: Path) -> None:
    if path.name in ("commands.py", "cli.py", "demo.py", "console.py", "options.py"):
        return
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in _imports(tree)} & {"click", "rich"}, f"{path.name} imports click or rich"
    if path.name == "runner.py":  # its output is its answer to the host
        return
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls


@FILES
def test_no_assert_speaks_to_a_user(path: Path) -> None:
    asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not asserts, f"{path.name} asserts in lines {asserts}: raise a RobxError"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_link(stage: str) -> None:
    link = ROOT / "robx" / stage
    if link.is_file() or not link.exists():
        pytest.skip("a checkout without symbolic links")
    assert link.is_symlink() and link.readlink() == Path("..") / stage


@pytest.mark.parametrize(
    "package", [p for p in MODULES.values() if p.name == "__init__.py" and p.parent.name != "robx"]
)
def test_the_init_of_a_stage_or_room_is_one_docstring(package: Path) -> None:
    tree = ast.parse(package.read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree)


@FILES
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_module_is_named_like_the_library_it_wraps() -> None:
    assert not {p.stem for p in MODULES.values()} & (HEAVY | {"tensorrt", "ncnn"})


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


def test_the_lists_of_networks_load_no_network() -> None:
    loaded = _modules_after(
        "from robx.cli import main\nfor command in ('teachers', 'students'):\n"
        "  try: main([command, '--long'] if command == 'teachers' else [command])\n  except SystemExit: pass"
    )
    assert "click" in loaded and not loaded & HEAVY


def test_the_records_need_the_standard_library_alone() -> None:
    assert not _modules_after("import robx.records") & (HEAVY | {"rich", "jinja2", "PIL", "click"})


def test_the_runtime_needs_neither_torch_nor_timm() -> None:
    loaded = _modules_after("import robx.runtime.session, robx.runtime.device.runner, robx.runtime.commands")
    assert not loaded & {"torch", "timm", "torchvision", "onnx", "nncf", "sklearn"}
