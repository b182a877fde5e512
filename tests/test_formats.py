"""The table of formats is complete: every row names files that exist and an extra that pyproject.toml has."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path

import pytest

from robx.formats import FORMATS, RUNTIMES, Format

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_type_and_the_table_name_the_same_formats() -> None:
    assert tuple(FORMATS) == typing.get_args(Format)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_names_a_builder_its_runtimes_and_its_extra(name: str) -> None:
    row = FORMATS[name]
    assert (ROOT / "export" / "formats" / f"{row.builder}.py").is_file()
    assert set(row.runtimes) <= set(RUNTIMES) and row.runtimes
    assert row.extra is None or row.extra in EXTRAS
    builder = (ROOT / "export" / "formats" / f"{row.builder}.py").read_text()
    assert row.takes_opset == ("opset=request.target.opset" in builder)
    assert ("int8" in row.precisions) == (row.quantiser is not None)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_names_its_engine_and_its_extra(name: str) -> None:
    row = RUNTIMES[name]
    assert row.engine is None or (ROOT / "runtime" / "engines" / f"{row.engine}.py").is_file()
    assert row.extra is None or row.extra in EXTRAS


def test_every_builder_and_engine_has_a_row() -> None:
    builders = {path.stem for path in (ROOT / "export" / "formats").glob("to_*.py")}
    engines = {path.stem for path in (ROOT / "runtime" / "engines").glob("on_*.py")} - {"on_torch"}
    assert builders == {row.builder for row in FORMATS.values()}
    assert engines == {row.engine for row in RUNTIMES.values() if row.engine}
