"""The files around the code: workflows, templates, citation and metadata agree with each other and with the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from robx import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
YAML = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.name)
def test_every_yaml_file_parses(path: Path) -> None:
    assert isinstance(_read(path), dict)


def test_ci_runs_the_checks_on_every_python_that_the_package_names() -> None:
    job = _read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["checks"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert any(step.get("run") == "bash .ci/run" for step in job["steps"])


def test_workflows_may_write_only_where_they_publish() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = _read(path)
        assert workflow["permissions"] == {"contents": "read"}
        writing = [name for name, job in workflow["jobs"].items() if "permissions" in job]
        assert writing == (["publish"] if path.name == "release.yml" else [])


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert _read(ROOT / "CITATION.cff")["version"] == __version__
    newest = re.search(r"^## (\S+?)[, ]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None and newest[1] == __version__


def test_every_form_has_fields_with_labels() -> None:
    for name in ("bug", "feature"):
        form = _read(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
        assert form["name"] and form["description"]
        assert all(field["attributes"]["label"] and field["id"] for field in form["body"])
        assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_three_sizes_of_tests_are_targets_and_slow_is_a_marker() -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"test", "test-unit", "test-slow", "docs", "release"} <= set(targets)
    slow = re.findall(r'^    "([\w/.:]+)",$', (ROOT / "tests" / "conftest.py").read_text(), flags=re.MULTILINE)
    assert slow and all((ROOT / "tests" / name.partition("::")[0]).exists() for name in slow)
    markers = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    assert any(marker.startswith("slow:") for marker in markers)
