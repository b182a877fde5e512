"""The JSON of real reports against its published schema, with a validator that knows nothing of the types."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robx.eval.report import schema as types
from robx.eval.report.collect import collect
from robx.eval.report.render import make_pages

DOCS = Path(__file__).parents[3] / "docs"
SCHEMA = json.loads((DOCS / "report.schema.json").read_text())
_KINDS: dict[str, Any] = {
    "string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None), "array": list,
    "object": dict,
}  # fmt: skip
_KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "type", "enum", "anyOf", "properties", "required",
    "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
}  # fmt: skip


def problems(value: Any, rule: dict[str, Any], where: str = "$") -> list[str]:
    """What contradicts a JSON Schema, of the keywords that the report's uses."""
    assert set(rule) <= _KNOWN, f"this validator does not know {set(rule) - _KNOWN}"
    if "$ref" in rule:
        return problems(value, SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]], where)
    if "anyOf" in rule:
        found = [problems(value, one, where) for one in rule["anyOf"]]
        return min(found, key=len) if all(found) else []
    if "enum" in rule:
        return [] if value in rule["enum"] else [f"{where}: {value!r} is not in {rule['enum']}"]
    kind = rule.get("type")
    if kind and (not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{where}: {value!r:.60} is not of type {kind}"]
    if kind == "array":
        rules = rule.get("prefixItems") or [rule["items"]] * len(value)
        wrong_size = not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value))
        wrong = [f"{where} has {len(value)} items"] if wrong_size else []
        return wrong + [
            p for i, one in enumerate(value[: len(rules)]) for p in problems(one, rules[i], f"{where}[{i}]")
        ]
    if kind == "object":
        named = rule.get("properties", {})
        missing = [f"{where}.{key} is missing" for key in rule.get("required", []) if key not in value]
        other = rule.get("additionalProperties", {})
        unknown = [f"{where}.{key} is unknown" for key in value if named and key not in named]
        return (
            missing + unknown + [p for k, v in value.items() for p in problems(v, named.get(k, other), f"{where}.{k}")]
        )
    return []


@pytest.fixture(scope="module")
def reports(records: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Everything at once, a lone run, and a page of UNSTABLE latencies and damage."""
    root = tmp_path_factory.mktemp("schema")
    records.write_everything(root / "all")
    student = records.write_run(root / "lone" / "r")
    place = root / "shaky" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900)
    records.write_latency(place, bundle.id, 7.0, verdict="UNSTABLE", reasons=("drift: 9 %",))
    (root / "shaky" / "bad").mkdir()
    (root / "shaky" / "bad" / "manifest.json").write_text("{")
    return [json.loads(make_pages(collect([root / name]), budgets=()).json) for name in ("all", "lone", "shaky")]


def test_real_reports_follow_the_published_schema(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert problems(report, SCHEMA) == []
    assert reports[0]["summaries"] and reports[2]["devices"][0]["provisional"] and reports[2]["doubts"]


def test_the_validator_finds_what_is_wrong(reports: list[dict[str, Any]]) -> None:
    report = json.loads(json.dumps(reports[0]))
    report["margin"], report["rows"][0]["gate"], report["devices"][0]["surprise"] = 1.0, None, 1
    del report["title"]
    found = " ".join(problems(report, SCHEMA))
    assert all(words in found for words in ("$.margin", "$.rows[0].gate", "surprise is unknown", "$.title is missing"))


def test_the_page_of_the_documentation_names_every_key() -> None:
    text = (DOCS / "report.md").read_text()
    shown = (types.Report, types.DeviceAdvice, types.Span, types.Asked, types.Excluded, types.Summary, types.CurveEntry)
    for kind in (*shown, types.MeasurementEntry):
        for key in kind.__annotations__:
            if key != "measurement":
                assert f"`{key}`" in text, key
