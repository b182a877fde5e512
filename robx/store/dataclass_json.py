"""Frozen dataclasses to plain JSON values and back, and checks of foreign JSON; whatever does not match is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from robx.errors import ArtifactError

SCHEMA = 1

Json = Any  # null, bool, int, float, str, list or dict of these
Record = TypeVar("Record")
_short = reprlib.Repr()
_short.maxstring = _short.maxlong = 80
_shown = _short.repr  # of a value in a message


def to_json(record: Any) -> Json:
    """A record as plain JSON values."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


def from_json(cls: type[Record], value: Json, *, where: str = "record") -> Record:
    """A record from plain JSON values.

    Raises:
        ArtifactError: a newer schema, an unknown or missing key, or a value of the wrong type; the message names it.
    """
    schema = value.get("schema") if isinstance(value, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(f"{where} has schema {schema}, but this version of robx reads up to {SCHEMA}: upgrade robx")
    return typing.cast(Record, _parse(cls, value, where))


def check_json(kind: Any, value: Json, *, where: str) -> Any:
    """`value` itself, when it matches the type `kind`: a TypedDict (which allows further keys), or any field's type.

    Raises:
        ArtifactError: it does not match; the message names the key.
    """
    return _parse(kind, value, where)


def parse_json(text: str | bytes, *, limit: float = math.inf) -> Json:
    """JSON without NaN and infinity, and with no number of magnitude `limit` or more.

    Raises:
        ValueError: it is not that, or is nested too deeply.
    """

    def number(digits: str) -> int | float:
        value = float(digits)  # inf, not an error, however many digits there are
        if not abs(value) < limit:
            raise ValueError(f"the number {digits[:20]} is too large")
        return value if "." in digits or "e" in digits.lower() else int(digits)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not valid JSON")

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number, parse_int=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parse(kind: Any, value: Json, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _parse_union(arguments, value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ArtifactError(f"{where}: {_shown(value)} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if (origin or kind) in (os.PathLike, Callable):  # of an argument, not of JSON
        fits = callable(value) if origin is Callable else isinstance(value, os.PathLike)
        if not fits:
            raise ArtifactError(f"{where}: {_shown(value)} is not a {'path' if origin is os.PathLike else 'function'}")
        return value
    if origin in (list, Sequence):
        return list(_parse_tuple((arguments[0], Ellipsis), value, where))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: {_shown(value)} is not an object")
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if typing.is_typeddict(kind):
        return _parse_typed_dict(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_record(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _parse_float(value, where)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ArtifactError(f"{where}: {_shown(value)} is not of type {kind.__name__}")
    return value


def _parse_float(value: int | float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):  # robx never writes these
        raise ArtifactError(f"{where}: {_shown(value)} is not a finite number")
    return number


def _parse_union(kinds: tuple[Any, ...], value: Json, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _parse(kind, value, where)
        except ArtifactError as error:
            errors.append(error)
    raise errors[-1]


def _parse_tuple(kinds: tuple[Any, ...], value: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ArtifactError(f"{where}: {_shown(value)} is not a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_parse(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(kinds) != len(value):
        raise ArtifactError(f"{where}: expected {len(kinds)} items, got {len(value)}")
    return tuple(_parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _parse_typed_dict(kind: Any, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: {_shown(value)} is not an object")
    for key, wanted in typing.get_type_hints(kind).items():
        if key not in value:
            raise ArtifactError(f"{where}: the key {key!r} is missing")
        _parse(wanted, value[key], f"{where}.{key}")
    return value


def _parse_record(cls: type, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: expected an object, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - set(fields)):
        raise ArtifactError(f"{where}: unknown key {_shown(unknown[0])}; the known keys are {', '.join(fields)}")
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(value)):
        raise ArtifactError(f"{where}: the key {missing[0]!r} is missing")
    return cls(**{name: _parse(hints[name], item, f"{where}.{name}") for name, item in value.items()})
