"""Which figure of a Latency decides."""

from robx.eval.report.rows import Figure, _bound
from robx.records import Value


def test_the_bound_is_the_sustained_one_where_it_was_measured():
    cold = Figure(value=Value(value=5.0, high=6.0, unit="ms"), source="a values.p90")
    warm = Figure(value=Value(value=7.0, high=8.0, unit="ms"), source="a values.sustained_p90")
    bound = _bound({"p90": cold, "sustained_p90": warm})
    assert bound is not None and (bound.value.value, bound.source) == (8.0, "a values.sustained_p90.high")
    bound = _bound({"p90": cold})
    assert bound is not None and bound.value.value == 6.0
    assert _bound({"p90": Figure(value=Value(value=5.0), source="a")}) is None, "a bare p90 is no bound"
