"""What the tests of eval share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def records() -> ModuleType:
    """report_records.py: invented records, and folders of them in the shape that robx writes."""
    return _load("report_records")


@pytest.fixture(scope="session")
def devtools() -> ModuleType:
    """devtools.py: headless Chromium."""
    return _load("devtools")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
