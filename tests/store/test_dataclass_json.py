"""Foreign JSON: what is refused before any other code sees it."""

from __future__ import annotations

from typing import TypedDict

import pytest

from robx.errors import ArtifactError
from robx.store.dataclass_json import check_json, parse_json


class Inner(TypedDict):
    count: int | None


class Outer(TypedDict):
    name: str
    sizes: list[float]
    inner: Inner | None


GOOD = {"name": "x", "sizes": [1, 2.5], "inner": {"count": 3}}


def test_a_typed_dict_is_returned_as_it_is_with_its_further_keys() -> None:
    value = GOOD | {"more": object()}
    assert check_json(Outer, value, where="report") is value
    assert check_json(Outer, GOOD | {"inner": None}, where="report")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "report.name: 3 is not of type str"),
        ({"sizes": "many"}, "report.sizes: 'many' is not a list"),
        ({"sizes": [1, None]}, r"report.sizes\[1\]: None is not of type float"),
        ({"inner": {}}, "report.inner: the key 'count' is missing"),
        ({"inner": {"count": True}}, "report.inner.count: True is not of type int"),
        ({"inner": 4}, "report.inner: 4 is not an object"),
    ],
)
def test_a_typed_dict_names_the_key_that_does_not_match(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_json(Outer, GOOD | change, where="report")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "9" * 400, "[" * 100_000, "{", ""])
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_numbers_keep_their_type_and_their_limit() -> None:
    assert parse_json("[1, -2, 3.0, 4e2]") == [1, -2, 3.0, 400.0]
    assert [type(n) for n in parse_json("[1, 3.0, 4e2, 5E2]")] == [int, float, float, float]
    assert parse_json(str(2**62), limit=2.0**63) == 2**62
    for digits in (str(2**63), f"-{2**63}", "1e19"):
        with pytest.raises(ValueError, match="is too large"):
            parse_json(digits, limit=2.0**63)
