"""README.md and docs/: every command and snippet runs as it stands, every link leads somewhere, the site builds.

A fenced block is run, in the order of its page, unless a comment before it says why it cannot be:
`<!-- not run: reason -->`. Such a block is still parsed: its commands, options, values, extras, make targets and files
exist, and its Python compiles. A command that another page has run already is not run again.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import robx.api
import robx.errors
import robx.records
from robx import api
from robx.cli import main
from robx.distill.recipes import Recipe
from robx.errors import CorruptImage
from robx.image_size import at_size
from robx.images.decode import decode, preprocess
from robx.records import load_bundle, load_measurements, to_json
from tests.docs.conftest import World
from tests.odd_pictures import odd_pictures, pictures_without_white

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [
    *PAGES,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
]
_FENCE = re.compile(
    r"(?P<mark><!-- not run: [^\n]*-->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
# Programs of the system, whose own options are not checked here.
_OTHERS = {
    *("adb", "apt-get", "cd", "cmake", "export", "g++", "git", "mkdir", "sbatch", "scp", "ssh", "sudo", "tar", "unzip"),
    *("echo", "cp", "tensorboard", "docker", "gh", "twine", "pipx", "uv", "python3"),
    *("nvpmodel", "jetson_clocks", "eval"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    run: bool

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, with continued lines joined and comments removed."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, from top to bottom."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        lines = (line.removeprefix(match["indent"]) for line in match["text"].splitlines(keepends=True))
        yield Block(
            page=page,
            line=text[: match.start("text")].count("\n"),
            language=match["language"],
            text="".join(lines),
            run=match["mark"] is None,
        )


def indented_commands(page: Path) -> Iterator[str]:
    """The commands in indented blocks, without what stands behind them in a second column."""
    for line in _FENCE.sub("", page.read_text()).replace("\\\n", " ").splitlines():
        if re.match(r"    (robx|torchrun|make|pip|python) ", line):
            command, _, beside = line.strip().partition("   ")
            yield f"{command} {beside.strip()}" if beside.strip().startswith("-") else command


def check(block: Block) -> None:
    """Check a block without running it; raises AssertionError, click.UsageError or SyntaxError."""
    if block.language == "python":
        compile(block.text, str(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language in ("sh", "console"):
        for command in block.commands:
            check_command(command)


def check_command(line: str) -> None:
    """Whether a shell line names things that exist: commands and options of robx, extras, make targets, scripts."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):  # environment variables
        words = words[1:]
    for operator in ("|", ">", "&&", ";"):
        words = words[: words.index(operator)] if operator in words else words
    program, *arguments = words
    if program.startswith(".venv"):
        program = Path(program).name
    if program == "torchrun" or words[:3] == ["python", "-m", "torch.distributed.run"]:
        arguments = words[words.index("-m", 1 if program == "torchrun" else 3) + 1 :]
        assert arguments.pop(0) == "robx.cli", line
        program = "robx"
    if program == "robx":
        check_robx(arguments)
    elif program == "make":
        targets = {word for word in arguments if "=" not in word}
        known = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert targets <= set(known), f"no such target: {line}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"robx\[([\w,-]+)\]", line):
            assert set(named.split(",")) <= set(extras), f"no such extra: {line}"
    elif program == "python":
        script = next((word for word in arguments if word.endswith(".py")), None)
        assert script is None or "/" not in script or (ROOT / script).is_file(), f"no such script: {line}"
    else:
        assert program in _OTHERS, f"unknown program: {line}"


def check_robx(arguments: list[str]) -> None:
    """Parse a command line of robx; "..." stands for any other arguments."""
    if not arguments or arguments[0].startswith("-"):
        return
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None, f"no such command: robx {' '.join(arguments)}"
    given = [word for word in arguments[1:] if word not in ("...", "--help")]
    shortened = len(given) < len(arguments) - 1
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), given[0])
        assert found is not None, f"no such command: robx {' '.join(arguments)}"
        command, given = found, given[1:]
    if not shortened:
        command.make_context("robx", given)
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = {word for word in given if word.startswith("-")} - known
    assert not unknown, f"robx {arguments[0]} has no option {', '.join(unknown)}"


def _title(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", ALL, ids=_title)
def test_what_a_block_names_exists(block: Block) -> None:
    check(block)


@pytest.mark.parametrize("page", LINKING, ids=lambda p: p.name)
def test_what_an_indented_command_names_exists(page: Path) -> None:
    for command in indented_commands(page):
        check_command(command)


QUICKSTART = ROOT / "docs" / "quickstart.md"  # makes the run and the bundles that the other pages use


RUNNABLE = sorted((p for p in PAGES if any(block.run for block in blocks(p))), key=lambda p: p != QUICKSTART)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page: Path, world: World) -> None:
    run_page(QUICKSTART, world)
    run_page(page, world)


def test_the_python_of_the_readme_makes_what_it_says(world: World) -> None:
    """Only its surroundings are smaller: images, the networks behind the names, recipe, int8 search and bench."""
    found = run_page(ROOT / "README.md", world)
    student, bundle = found["student"], found["bundle"]
    assert student.record.timm_name == "resnet18" and student.record.images_seen == 304
    assert bundle.record.requested == "int8" and bundle.path.parent == Path("runs/r18")
    kinds = {record.kind for record in load_measurements(bundle.path / "measurements.jsonl")}
    assert kinds == {"fidelity", "latency"}
    assert Path("report.html").is_file() and Path("report.md").is_file()
    pages = repr(api.report("runs/r18"))
    assert pages.startswith("Pages(title=") and len(pages) < 200
    assert api.open("runs/r18/openvino-int8").embed("photos/").shape == (5, student.record.width)
    assert api.load(student).preprocessing(Image.new("RGB", (50, 40))).shape == (3, 32, 32)  # type: ignore[operator]


def run_page(page: Path, world: World) -> dict[str, Any]:
    """Run the blocks of a page that have not been run; returns what its Python defines, once for each page."""
    if page in world.defined:
        return world.defined[page]
    found = world.defined[page] = dict[str, Any]()
    for block in blocks(page):
        if block.run and block.language == "sh":
            for command in (" ".join(line.split()) for line in block.commands):
                if command not in world.commands:
                    _run(command)
                    world.commands.add(command)
        elif block.run and block.language == "python" and _can_import(block):
            exec(compile(block.text, _title(block), "exec"), found)
    return found


def _can_import(block: Block) -> bool:
    """Whether the other libraries that a snippet shows are installed; it was compiled all the same."""
    return "import lightning" not in block.text or importlib.util.find_spec("lightning") is not None


def _run(line: str) -> None:
    """Run a command of robx in this process; other programs were checked by name."""
    program, *arguments = shlex.split(line, comments=True)
    if program != "robx" or "..." in arguments:
        return
    target = Path(arguments.pop()) if len(arguments) > 1 and arguments[-2] == ">" else None
    result = CliRunner().invoke(main, arguments[:-1] if target else arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if target:
        target.write_text(result.stdout)


def test_the_recipe_page_is_current() -> None:
    generate = _load(ROOT / "docs" / "generate.py")
    page = (ROOT / "docs" / "recipe-keys.md").read_text()
    assert page == generate.page(), "run: python docs/generate.py"
    assert generate.PLAN_PAGE.read_text() == generate.plan_page(), "run: python docs/generate.py"
    assert generate.SCHEMA.read_text() == generate.schema(), "run: python docs/generate.py"
    assert {f"`{field.name}`" for field in fields(Recipe)} <= set(re.findall(r"`\w+`", page))


@pytest.mark.parametrize("module", [robx.api, robx.errors, robx.records], ids=lambda module: module.__name__)
def test_the_api_page_lists_every_class_and_the_functions_of_the_api(module: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text().partition(f"::: {module.__name__}\n")[2]
    listed = re.findall(r"\w+", re.search(r"members:\s*\[(.*?)\]", page, flags=re.DOTALL)[1])  # type: ignore[index]
    public = {name for name, found in vars(module).items() if name[0] != "_" and _is_of(found, module)}
    classes = {name for name in public if isinstance(vars(module)[name], type)}
    assert public >= set(listed) >= (public if module is robx.api else classes), "complete docs/api.md"


def _is_of(found: Any, module: ModuleType) -> bool:
    return callable(found) and getattr(found, "__module__", "") == module.__name__


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2])
    assert {page.name for page in PAGES[1:]} <= set(nav) and len(nav) == len(set(nav))


_LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", LINKING, ids=lambda p: p.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


MESSAGES = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Every text in robx's code; an f-string with a gap for each value, and neighbouring literals as one."""
    found = []
    for top in ("robx", "distill", "export", "runtime", "eval"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_the_page_explains_exists(message: str, said: list[str]) -> None:
    parts = [part.strip() for part in message.split("…") if part.strip()]
    assert any(all(part in text for part in parts) for text in said), f"no message says: {message}"


def test_a_bundle_runs_without_robx(world: World) -> None:
    """The preprocessing of docs/bundle.md, which is written out without robx, against robx's own, on odd sizes."""
    snippet = next(b for b in blocks(ROOT / "docs" / "bundle.md") if b.language == "python")
    assert not re.search(r"^(from|import) robx", snippet.text, flags=re.MULTILINE)
    run_page(QUICKSTART, world)
    found: dict[str, Any] = {}
    exec(compile(snippet.text, "bundle.md", "exec"), found)
    square = load_bundle(Path("runs/r18/onnx-fp32")).preprocessing
    for wanted in (square, at_size(square, (48, 20)), at_size(square, (20, 48))):
        found["steps"] = to_json(wanted)
        for size in ((50, 40), (33, 77), (40, 40), (300, 31), (640, 31)):
            pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save("odd.png")
            expected = preprocess(Image.fromarray(pixels), wanted)[None]
            np.testing.assert_allclose(found["preprocess"]("odd.png"), expected, rtol=0, atol=1e-6)


def test_the_decoding_that_is_printed_is_that_of_robx() -> None:
    """The function in docs/bundle.md on images that are not plain RGB."""
    snippet = next(b for b in blocks(ROOT / "docs" / "bundle.md") if b.language == "python")
    (function,) = re.findall(r"^def decode\(.*?\n\n\n", snippet.text, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(f"import numpy as np\nfrom PIL import Image, ImageOps\n{function}", found)
    for what, data in odd_pictures():
        mine, expected = found["decode"](io.BytesIO(data)), decode(data, name=what)
        assert mine.size == expected.size and mine.tobytes() == expected.tobytes(), what
    for what, data in pictures_without_white():
        with pytest.raises(CorruptImage):
            decode(data, name=what)
        with pytest.raises(ValueError, match=r"pixels from .* scale them to 0..1"):
            found["decode"](io.BytesIO(data))


def test_a_student_loads_into_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/finetune.md, with a ResNet-18 of full size: timm's and torchvision's have the same keys and outputs."""
    (snippet,) = (b for b in blocks(ROOT / "docs" / "finetune.md") if "torchvision.models" in b.text)
    torch.manual_seed(2)
    trunk = timm.models.resnet.resnet18(num_classes=0)
    (tmp_path / "runs" / "r18").mkdir(parents=True)
    save_file(trunk.state_dict(), tmp_path / "runs" / "r18" / "student.safetensors")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(snippet.text, "finetune.md", "exec"), found)
    network, images = found["network"].eval(), torch.rand(2, 3, 64, 64)
    network.fc = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(network(images), trunk.eval()(images))


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
