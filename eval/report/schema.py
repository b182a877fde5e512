"""The report's JSON: its types, and the JSON Schema made from them (docs/report.schema.json).

Other programs read this file (dashboards, release scripts), so a key keeps its meaning within one number of `schema`;
new keys may be added. The records in it are those of `robx.records`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal, TypedDict, Union

from robx.eval.report.rows import Row
from robx.records import Bundle, Measurement, Student

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Summary(TypedDict):
    """What to deploy on one device, in words."""

    device: Annotated[str, "the device's name, as in `devices` and `rows`"]
    text: Annotated[str, "what to deploy, its gain in speed and size, its loss in accuracy, and how sure both are"]


class Span(TypedDict):
    """The recommendation for a range of latency budgets."""

    from_ms: Annotated[float, "smallest budget, in ms"]
    below_ms: Annotated[float | None, "the budgets are below this, in ms; null: no limit"]
    model_id: Annotated[str | None, "id of the recommended model; null: none fits"]


class Asked(TypedDict):
    """The recommendation for a budget that was asked for."""

    budget_ms: Annotated[float, "the budget, in ms"]
    model_id: Annotated[str | None, "id of the recommended model; null: none fits"]


class Excluded(TypedDict):
    """A model that is not recommended on a device."""

    model_id: Annotated[str, "id of the model"]
    why: Annotated[str, "the reason, in words"]


class DeviceAdvice(TypedDict):
    """The recommendations on one device."""

    device: Annotated[str, "the device and how it was used: threads, batch, provider"]
    emulated: Annotated[str, "why the device counts as emulated, and nothing is recommended for it; else empty"]
    recommended: Annotated[str | None, "id of the recommended model where no budget is given; null: none"]
    budgets: Annotated[list[Span], "the recommendation for every budget from 0 up"]
    asked: Annotated[list[Asked], "that for the budgets of `--budget`"]
    provisional: Annotated[
        list[Span], "what the UNSTABLE measurements suggest where none is VALID; not a recommendation"
    ]
    left_out: Annotated[list[Excluded], "the models that are not recommended, and why"]


class RunEntry(TypedDict):
    """A distillation run."""

    folder: Annotated[str, "the run's folder"]
    student: Annotated[Student, "its student.json"]


class CurveEntry(TypedDict):
    """The training curves of a run."""

    folder: Annotated[str, "the run's folder"]
    lines: Annotated[list[dict[str, float]], "the numbers of each line of its metrics.jsonl"]


class BundleEntry(TypedDict):
    """A bundle."""

    folder: Annotated[str, "the bundle's folder"]
    id: Annotated[str, "its id, which measurements refer to"]
    bundle: Annotated[Bundle, "its manifest.json"]


class MeasurementEntry(TypedDict):
    """One line of a measurements.jsonl."""

    file: Annotated[str, "the file that the record was read from"]
    line: Annotated[int, "its line, from 1"]
    measurement: Annotated[Measurement, "the record"]
    raw: Annotated[int | None, "number of raw samples found that match the recorded hash; null: none"]


class Report(TypedDict):
    """Everything that the page shows, and where it comes from."""

    schema: Annotated[int, "number of this schema: 1"]
    title: Annotated[str, "the decision in a line"]
    margin: Annotated[str, "accepted drop of top-1 accuracy, in points"]
    accuracy: Annotated[str, "the accuracy that models are compared by: protocol and images"]
    summaries: Annotated[list[Summary], "the page's first lines, one for each device with a recommendation"]
    devices: Annotated[list[DeviceAdvice], "the recommendations"]
    rows: Annotated[
        list[Row], "every model on every device; a figure has its `value`, its `source` and `how` it was made"
    ]
    doubts: Annotated[
        list[tuple[str, str, str]], "what is unstable, undecided, missing or damaged: kind, subject, reason"
    ]
    warnings: Annotated[list[str], "licences that forbid commercial use, or are unknown"]
    data: Annotated[list[str], "what the images are and are not"]
    students: Annotated[list[RunEntry], "the runs"]
    curves: Annotated[list[CurveEntry], "their training curves"]
    bundles: Annotated[list[BundleEntry], "the bundles"]
    measurements: Annotated[list[MeasurementEntry], "the measurements"]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    definitions: dict[str, Any] = {}
    root = _schema_of(Report, definitions)
    return {"$schema": DIALECT, "title": "robx report", **root, "$defs": dict(sorted(definitions.items()))}


_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number"}


def _schema_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if kind is type(None):
        return {"type": "null"}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if origin is Annotated:
        return {**_schema_of(arguments[0], definitions), "description": arguments[1]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(one, definitions) for one in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], definitions)}
    if origin is list or (origin is tuple and arguments[1:] == (Ellipsis,)):
        return {"type": "array", "items": _schema_of(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema_of(one, definitions) for one in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # a type may contain itself
        definitions[kind.__name__] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass or a TypedDict; all its keys are always written."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        hints = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {
        "description": (kind.__doc__ or "").split("\n")[0],
        "type": "object",
        "properties": {name: _schema_of(hint, definitions) for name, hint in hints.items()},
        "required": list(hints),
    }
