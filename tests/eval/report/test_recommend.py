import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robx.eval.report.recommend import advise, pick, steps, why_not
from robx.eval.report.rows import Figure, Row
from robx.records import Value


def row(
    name: str,
    ms: float,
    top1: float | None = None,
    *,
    precision: str = "int8",
    drop: tuple[float, float] | None = (0.2, 0.8),
    **changes: object,
) -> Row:
    fields: dict = {
        "model_id": name,
        "student": "s",
        "name": name,
        "format": "openvino",
        "precision": precision,
        "folder": name,
        "bytes": 1000,
        "gate": "PASS",
        "gate_reason": "",
        "device": "pi",
        "accuracy": {} if top1 is None else {"knn": Figure(value=Value(value=top1), source="")},
        "drop": Figure(value=Value(value=drop[0], high=drop[1]), source="") if drop else None,
        "judged": "PASS",
        "bound": Figure(value=Value(value=ms), source=""),
        "validity": "VALID",
    }
    return Row(**(fields | changes))


def fp32(name: str, ms: float, top1: float | None = None, **changes: object) -> Row:
    return row(name, ms, top1, precision="fp32", drop=None, judged="NOT_JUDGED", **changes)


def advice(*rows: Row, **settings: object):
    (one,) = advise(rows, protocol="knn", **settings)
    return one


def picks(one) -> list[tuple[float, float, str | None]]:
    return [(s.start, s.end, s.row.name if s.row else None) for s in one.steps]


def test_int8_within_a_point_beats_fp32_at_every_budget():
    one = advice(fp32("full", 20, 61.0), row("small", 8, 60.5))
    assert picks(one) == [(0, 8, None), (8, math.inf, "small")]
    assert one.best is not None and one.best.name == "small"


def test_fp32_wins_when_int8_gives_away_more_than_a_point_and_fits_only_above_its_own_latency():
    one = advice(fp32("full", 20, 61.0), row("small", 8, 59.9, drop=(1.1, 1.4)))
    assert picks(one) == [(0, 20, None), (20, math.inf, "full")]
    assert [(out.row.name, "1.40 points" in out.why) for out in one.left_out] == [("small", True)]


def test_a_larger_budget_buys_a_more_accurate_student():
    one = advice(
        fp32("tiny32", 9, 60.0), row("tiny8", 4, 59.6), fp32("big32", 30, 66.0, student="b"), row("big8", 12, 65.8)
    )
    assert picks(one) == [(0, 4, None), (4, 12, "tiny8"), (12, math.inf, "big8")]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"judged": "INCONCLUSIVE", "judged_why": "too few images"}, "INCONCLUSIVE: too few images"),
        ({"judged": "FAIL"}, "accuracy FAIL"),
        ({"drop": None}, "drop was not measured: run robx eval x --fidelity"),
        ({"gate": "FORCED", "gate_reason": "by hand"}, "FORCED: by hand"),
        ({"gate": "FAIL"}, "export gate says FAIL"),
        ({"bound": None}, "no upper bound"),
        ({"margin": 2.0, "drop": Figure(value=Value(value=0.2, high=1.2), source="")}, "1.20 points"),
        ({"format": "torch"}, "reference"),
    ],
)
def test_who_is_no_candidate_and_why(changes, word):
    fields = {"drop": (0.2, 0.8)} | changes
    candidate = row("x", 5, 60, **{k: v for k, v in fields.items() if not isinstance(v, Figure) and k != "margin"})
    figures = {k: v for k, v in changes.items() if isinstance(v, Figure) or k == "margin"}
    if figures:
        candidate = replace(candidate, **figures)
    assert word in (why_not(candidate, 1.0) or "")


def test_a_pass_at_no_wider_margin_is_enough_and_fp32_needs_its_parity():
    assert why_not(row("x", 5, drop=(0.4, 1.05), margin=1.0), 1.0) is None
    assert why_not(row("x", 5, drop=(0.4, 1.05), margin=1.0), 0.5) is not None
    assert why_not(fp32("x", 5), 1.0) is None
    assert why_not(fp32("x", 5, gate="NOT_JUDGED"), 1.0) is not None
    assert why_not(replace(fp32("x", 5, gate="NOT_JUDGED"), judged="PASS"), 1.0) is None
    assert "FAIL" in (why_not(replace(fp32("x", 5), judged="FAIL"), 1.0) or "")


def test_only_valid_latencies_recommend_and_unstable_ones_only_say_what_they_would():
    quiet, noisy = fp32("full", 20, 61.0), row("small", 8, 60.5, validity="UNSTABLE", reasons=("drift: 5 %",))
    assert picks(advice(quiet, noisy)) == [(0, 20, None), (20, math.inf, "full")]
    assert advice(quiet, noisy).provisional == ()
    alone = advice(noisy, row("broken", 1, 60.5, validity="INVALID"))
    assert alone.steps == () and alone.best is None
    assert [s.row.name for s in alone.provisional if s.row] == ["small"]
    assert {out.row.name: out.why for out in alone.left_out}["small"] == "latency UNSTABLE: drift: 5 %"


def test_without_any_accuracy_one_student_is_ranked_by_its_drop_and_two_are_not_compared():
    one = advice(fp32("full", 20), row("small", 8))
    assert one.best is not None and one.best.name == "small"
    two = advice(fp32("full", 20), row("other", 8, student="t"))
    assert two.best is None and len(two.left_out) == 2


def test_devices_are_judged_apart_and_asked_budgets_answered():
    found = advise(
        [fp32("full", 20, 61, device="pc"), row("small", 8, 60.5)], protocol="knn", budgets=(5.0, 8.0, 100.0)
    )
    assert [(a.device, a.best.name if a.best else None) for a in found] == [("pc", "full"), ("pi", "small")]
    assert [(b, r.name if r else None) for b, r in found[1].asked] == [(5, None), (8, "small"), (100, "small")]


rows_strategy = st.lists(
    st.tuples(st.integers(1, 60), st.integers(500, 700)), min_size=1, max_size=8, unique_by=lambda pair: pair[0]
).map(lambda pairs: [row(f"m{i}", ms, top1 / 10) for i, (ms, top1) in enumerate(pairs)])


@given(rows_strategy, st.integers(0, 70), st.floats(0.0, 3.0))
def test_every_budget_has_the_answer_that_trying_all_models_gives(rows, budget, margin):
    def score(r: Row) -> float:
        return r.accuracy["knn"].value.value

    fits = [r for r in rows if r.bound.value.value <= budget]
    near = [r for r in fits if score(r) >= max(map(score, fits)) - margin]
    expected = min(near, key=lambda r: r.bound.value.value) if near else None
    assert pick(rows, budget=budget, score=score, margin=margin) is expected
    covering = [s for s in steps(rows, score=score, margin=margin) if s.start <= budget < s.end]
    assert [s.row for s in covering] == [expected]


@given(rows_strategy, st.floats(0.0, 3.0))
def test_the_steps_cover_all_budgets_without_gap_and_never_repeat(rows, margin):
    found = steps(rows, score=lambda r: r.accuracy["knn"].value.value, margin=margin)
    assert found[0].start == 0 and found[0].row is None and found[-1].end == math.inf
    assert all(a.end == b.start and a.row is not b.row for a, b in pairwise(found))
