"""A checkout whose symbolic links were not made (core.symlinks=false, a zip) imports robx and runs its tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("distill", "export", "runtime", "eval")


@pytest.fixture(params=["text files", "nothing"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tree with what git writes for a link without core.symlinks, or with what a careless unzip leaves."""
    for folder in ("robx", *STAGES, "tests"):
        skipped = shutil.ignore_patterns("__pycache__", *(STAGES if folder == "robx" else ()))
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if request.param == "text files":
        for stage in STAGES:
            (tmp_path / "robx" / stage).write_text(f"../{stage}")
    return tmp_path


def _python(checkout: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_stage_is_imported_from_the_checkout(checkout: Path) -> None:
    names = [f"robx.{stage}.commands" for stage in STAGES]
    code = f"import sys, {', '.join(names)}\nfor name in {names}: print(sys.modules[name].__file__)"
    assert _python(checkout, "-c", code).split() == [str(checkout / stage / "commands.py") for stage in STAGES]


@pytest.mark.parametrize("checkout", ["text files"], indirect=True)
def test_its_tests_run(checkout: Path) -> None:
    tests = (
        "tests/test_architecture.py::test_a_stage_is_a_link",
        "tests/distill/test_recipes.py",
        "tests/export/test_image_splits.py",
        "tests/eval/datasets/test_layouts.py",
        "tests/runtime/bench/test_validity.py",
    )
    said = _python(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert "passed" in said and "failed" not in said
