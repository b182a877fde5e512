"""A wheel built from the sdist contains every stage, installs, and runs from any folder."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPING = PROJECT["tool"]["setuptools"]["package-dir"]
STAGES = ("distill", "export", "runtime", "eval")


def test_links_mapping_and_folders_agree() -> None:
    assert set(MAPPING) == {"robx", *(f"robx.{stage}" for stage in STAGES)}
    for package, folder in MAPPING.items():
        if package != "robx" and not (ROOT / Path(*package.split("."))).is_dir():
            continue  # a checkout without symbolic links
        assert (ROOT / Path(*package.split("."))).resolve() == (ROOT / folder).resolve()
    rooms = {f"robx.{room.name}" for room in _rooms(ROOT / "robx")}
    rooms |= {f"robx.{stage}.{room.name}" for stage in STAGES for room in _rooms(ROOT / stage)}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(MAPPING) | rooms


def _rooms(folder: Path) -> list[Path]:
    return [room for room in folder.iterdir() if (room / "__init__.py").is_file() and not room.is_symlink()]


def test_the_constraints_cover_every_dependency_of_the_demo_and_the_tests() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    chosen = ("openvino", "trt-rtx", "tensorboard", "jpeg", "dev")
    wanted = project["dependencies"] + [package for extra in chosen for package in extras[extra]]
    names = {w.split(">=")[0].lower().replace("_", "-") for w in wanted if not w.startswith("robx[")}
    assert names <= pinned, names - pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # No isolation: the build backend is installed already, and no package index is contacted.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_has_every_module_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package, folder in MAPPING.items():
        for source in [
            *(ROOT / folder).glob("*.py"),
            *(p for room in _rooms(ROOT / folder) for p in room.glob("*.py")),
        ]:
            inside = source.relative_to(ROOT / folder).as_posix()
            assert names.count(f"{package.replace('.', '/')}/{inside}") == 1
    sources = {f"robx/runtime/device/native/{p.name}" for p in (ROOT / "runtime/device/native").iterdir()}
    assert len(sources) > 20 and sources <= set(names)
    assert {"robx/py.typed", "robx/eval/report/report.html.j2", "robx/export/readme/readme.md.j2"} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "distill/", "eval/", "benchmarks/"))]


def test_the_sdist_has_no_links_and_no_tests(wheel: Path) -> None:
    sdist = next(wheel.parent.glob("*.tar.gz"))
    with tarfile.open(sdist) as tar:
        members = tar.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    below = {m.name.split("/", 1)[1] for m in members if "/" in m.name}
    assert not [name for name in below if name.startswith(("tests", "benchmarks", "runs"))]
    assert {
        "LICENSE",
        "CHANGELOG.md",
        "SECURITY.md",
        "pyproject.toml",
        "robx/cli.py",
        "eval/report/report.html.j2",
        "runtime/device/native/CMakeLists.txt",
        "export/readme/readme.md.j2",
    } <= below


def test_the_installed_wheel_runs_from_the_root_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import robx; print(robx.__file__); from robx.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "students"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    assert "mobilenetv3_large_100" in done.stdout
