"""The climb, with made-up rungs: the best that is right ships, luck on the judging images helps nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robx.errors import ArtifactError, MissingExtra
from robx.export.gate.search import Outcome, climb, level_of, preference, ships
from robx.export.int8.candidate import Candidate
from robx.records import Rung, Value, Verdict
from robx.stats import non_inferiority

Verdicts = dict[str, Verdict]


def _rung(candidate: Candidate, accuracy: Verdict, speedup: float | None, cosine: float = 0.9) -> Rung:
    """What a look at a candidate finds."""
    values = {"cosine_mean": Value(value=cosine), "screen_cosine": Value(value=cosine), "screened": Value(value=400)}
    if speedup is not None:
        values["speedup_fp32"] = Value(value=speedup, low=speedup * 0.99, high=speedup * 1.01)
    speed: Verdict = "INCONCLUSIVE" if speedup is None else "PASS" if speedup >= 1 else "FAIL"
    return Rung(
        name=candidate.name, settings={}, precision="int8", accuracy=accuracy, speed=speed, values=values, reason=""
    )


def _judged(rung: Rung, accuracy: Verdict) -> Rung:
    values = {name: value for name, value in rung.values.items() if name != "screened"}
    return replace(rung, accuracy=accuracy, values=values)


def _names(*names: str, quantiser: str = "nncf", **settings: Any) -> list[Candidate]:
    return [Candidate(name=n, quantiser=quantiser, **settings) for n in names]  # type: ignore[arg-type]


def _forms(*names: str) -> list[Candidate]:
    """Candidates whose graphs differ."""
    return [Candidate(name=n, quantiser="nncf", smooth_alpha=0.1 * i) for i, n in enumerate(names)]


def _careful(*names: str) -> list[Candidate]:
    return _names(*names, float_nodes=("stem",))


def _climb(
    candidates: Sequence[Candidate],
    *,
    screened: Verdicts | None = None,
    judged: Verdicts | None = None,
    speeds: dict[str, float] | None = None,
    cosines: dict[str, float] | None = None,
    **more: Any,
) -> Outcome:
    """A climb in which everything is sound, accurate, twice as fast and equally close unless it is said otherwise."""

    def look(candidate: Candidate) -> Rung:
        name = candidate.name
        verdict: Verdict = (screened or {}).get(name, "INCONCLUSIVE")
        return _rung(candidate, verdict, (speeds or {}).get(name, 2.0), (cosines or {}).get(name, 0.9))

    def hold(candidate: Candidate, rung: Rung, level: float) -> Rung:
        return _judged(rung, (judged or {}).get(candidate.name, "PASS"))

    return climb(candidates, look, hold, **more)


def _tried(outcome: Outcome) -> list[str]:
    return [rung.name for rung in outcome.rungs]


def test_the_fastest_ships_and_of_equally_fast_ones_the_closest() -> None:
    speeds = {"a": 1.5, "b": 2.0, "c": 1.99, "d": 2.02}
    cosines = {"a": 0.99, "b": 0.93, "c": 0.97, "d": 0.95}
    outcome = _climb(_forms("a", "b", "c", "d"), speeds=speeds, cosines=cosines)
    assert outcome.winner is not None and outcome.winner.name == "c"
    assert [r.kept for r in outcome.rungs] == [False, False, True, False]


def test_the_clock_does_not_choose_among_candidates_of_one_graph() -> None:
    speeds = {"a": 2.0, "b": 2.2, "c": 1.9}
    outcome = _climb(_names("a", "b", "c"), speeds=speeds, cosines={"a": 0.95, "b": 0.91, "c": 0.97})
    assert outcome.winner is not None and outcome.winner.name == "c"


def test_sound_candidates_are_timed_side_by_side_and_that_decides() -> None:
    raced: list[list[str]] = []

    def race(sound: Sequence[tuple[Candidate, Rung]]) -> list[Rung]:
        raced.append([candidate.name for candidate, _ in sound])
        speeds = {"a": 2.0, "b": 1.5, "d": 0.9}
        return [_rung(candidate, "INCONCLUSIVE", speeds[candidate.name]) for candidate, _ in sound]

    looked = {"a": 1.9, "b": 2.3, "c": 9.0, "d": 3.0}  # of different minutes
    outcome = _climb(_forms("a", "b", "c", "d"), speeds=looked, screened={"c": "FAIL"}, race=race)
    assert raced == [["a", "b", "d"]]
    assert outcome.winner is not None and outcome.winner.name == "a" and outcome.held == 1
    assert {r.name: r.values["speedup_fp32"].value for r in outcome.rungs} == {"a": 2.0, "b": 1.5, "c": 9.0, "d": 0.9}
    assert {r.name: r.speed for r in outcome.rungs}["d"] == "FAIL"
    assert _climb(_names("a"), race=race).winner is not None and len(raced) == 1  # one alone races nobody


def test_what_lost_too_much_in_screening_is_held_last() -> None:
    def screened(candidate: Candidate, drop: float, cosine: float) -> tuple[Candidate, Rung]:
        rung = _rung(candidate, "INCONCLUSIVE", 2.0, cosine)
        return candidate, replace(rung, values=rung.values | {"probe_drop": Value(value=drop)})

    a, b, c = _names("a", "b", "c")
    pairs = [screened(a, 4.1, 0.99), screened(b, 0.3, 0.95), screened(c, 2.2, 0.97)]
    assert [candidate.name for candidate, _ in preference(pairs, margin=3)] == ["c", "b", "a"]
    assert [candidate.name for candidate, _ in preference(pairs, margin=5)] == ["a", "c", "b"]


def test_one_candidate_alone_is_held_to_the_judging_images_when_it_passes() -> None:
    outcome = _climb(_names("a", "b", "c"), cosines={"b": 0.95})
    assert outcome.held == 1
    assert [rung.was_judged for rung in outcome.rungs] == [False, True, False]


def test_when_the_best_does_not_pass_the_next_best_is_held_at_a_stricter_level() -> None:
    levels: list[float] = []

    def hold(candidate: Candidate, rung: Rung, level: float) -> Rung:
        levels.append(level)
        return _judged(rung, "PASS" if candidate.name == "a" else "FAIL")

    speeds = {"a": 1.5, "b": 3.0, "c": 2.0}
    outcome = climb(_forms("a", "b", "c"), lambda c: _rung(c, "PASS", speeds[c.name]), hold)
    assert outcome.winner is not None and outcome.winner.name == "a" and outcome.held == 3
    assert levels == [level_of(1), level_of(2), level_of(3)]


def test_the_levels_add_up_to_five_percent() -> None:
    assert level_of(1) == pytest.approx(0.025)
    assert math.fsum(level_of(k) for k in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_trying_many_inaccurate_candidates_ships_one_as_rarely_as_it_says() -> None:
    """Eight candidates that lose exactly the margin, each with errors of its own: the worst that luck can do."""
    random = np.random.default_rng(0)
    n, margin, shipped, first_alone = 400, 5.0, 0, 0
    for _ in range(400):
        lost = {c.name: random.multinomial(n, [0.08, 0.03, 0.89]) for c in _names(*"abcdefgh")}

        def hold(candidate: Candidate, rung: Rung, level: float, lost: Any = lost) -> Rung:
            b, c, same = lost[candidate.name]
            reference = np.repeat([True, False, True], [b, c, same])
            answer = np.repeat([False, True, True], [b, c, same])
            return _judged(rung, non_inferiority(reference, answer, margin, level=level).verdict)

        outcome = climb(_names(*"abcdefgh"), lambda c: _rung(c, "INCONCLUSIVE", 2.0), hold)
        shipped += outcome.winner is not None
        plain = [hold(c, _rung(c, "PASS", 2.0), 0.05) for c in _names(*"abcdefgh")]
        first_alone += any(rung.accuracy == "PASS" for rung in plain)
    assert shipped / 400 < 0.075  # 5 % and what 400 draws leave to chance
    assert first_alone / 400 > 0.2  # what taking the first that passes at 5 % would have shipped


def test_what_screening_finds_broken_is_never_held() -> None:
    outcome = _climb(_names("a", "b"), screened={"a": "FAIL"}, speeds={"a": 9.0})
    assert outcome.winner is not None and outcome.winner.name == "b" and outcome.held == 1


def test_careful_rungs_wait_and_are_tried_when_the_plain_ones_do_not_pass() -> None:
    candidates = [*_names("plain"), *_careful("careful")]
    assert _tried(_climb(candidates)) == ["plain"]
    rescued = _climb(candidates, judged={"plain": "FAIL"})
    assert _tried(rescued) == ["plain", "careful"]
    assert rescued.winner is not None and rescued.winner.name == "careful"
    straight = _climb(candidates, screened={"plain": "FAIL"})
    assert straight.winner is not None and straight.winner.name == "careful" and straight.held == 1


def test_a_careful_rung_that_may_be_faster_does_not_wait_for_one_that_looks_sound() -> None:
    """After the plain one failed, all of it in int8 with corrected biases is worth a look beside the stem in float."""
    candidates = [*_names("plain"), *_careful("stem in float"), *_names("full bias", full_bias=True)]
    speeds = {"plain": 2.0, "stem in float": 1.5, "full bias": 2.0}
    outcome = _climb(candidates, judged={"plain": "FAIL"}, speeds=speeds)
    assert _tried(outcome) == ["plain", "stem in float", "full bias"]
    assert outcome.winner is not None and outcome.winner.name == "full bias"


@pytest.mark.parametrize("accuracy", ["FAIL", "INCONCLUSIVE"])
def test_nothing_ships_without_proof(accuracy: Verdict) -> None:
    outcome = _climb(_names("a", "b"), judged={"a": accuracy, "b": accuracy}, cosines={"a": 0.8, "b": 0.7})
    assert outcome.winner is None and outcome.held == 2
    assert outcome.best is not None and outcome.best.name == "a"
    assert not any(r.kept for r in outcome.rungs)


def test_a_rung_that_is_slower_is_refused_and_its_kin_are_not_tried() -> None:
    candidates = [*_names("a", "b"), *_names("c", quantiser="onnxruntime")]
    outcome = _climb(candidates, speeds={"a": 0.5, "b": 2.0, "c": 1.5})
    assert _tried(outcome) == ["a", "c"]
    assert outcome.winner is not None and outcome.winner.name == "c"


def test_a_slow_one_stops_those_that_leave_more_in_float_and_no_other_graph() -> None:
    slow, other = _forms("slow", "other")
    kin = replace(slow, name="kin", float_nodes=("stem",))
    outcome = _climb([slow, kin, other], speeds={"slow": 0.5})
    assert _tried(outcome) == ["slow", "other"]
    assert outcome.winner is not None and outcome.winner.name == "other"


def test_an_unmeasurable_speed_does_not_stop_an_accurate_rung() -> None:
    rung = _rung(Candidate(name="a"), "PASS", None)
    assert not ships(rung)  # only screened
    assert ships(_judged(rung, "PASS")) and not ships(_judged(rung, "INCONCLUSIVE"))
    order = preference([(c, _rung(c, "PASS", None, cosine)) for c, cosine in zip(_names("a", "b"), (0.8, 0.9))])  # noqa: B905
    assert [c.name for c, _ in order] == ["b", "a"]


@pytest.mark.parametrize("when", ["looked at", "held"])
def test_a_candidate_that_cannot_be_run_is_a_failed_rung_and_the_climb_goes_on(when: str) -> None:
    def look(candidate: Candidate) -> Rung:
        if candidate.name == "a" and when == "looked at":
            raise ArtifactError("cannot")
        return _rung(candidate, "PASS", 2.0)

    def hold(candidate: Candidate, rung: Rung, level: float) -> Rung:
        if candidate.name == "a":
            raise ArtifactError("cannot")
        return _judged(rung, "PASS")

    told: list[Rung] = []
    outcome = climb(_names("a", "b"), look, hold, on_rung=told.append)
    assert [r.name for r in told] == (["a", "b", "b"] if when == "looked at" else ["a", "b", "a", "b"])
    assert outcome.rungs[0].accuracy == "FAIL" and "cannot" in outcome.rungs[0].reason
    assert outcome.winner is not None and outcome.winner.name == "b"


def test_a_missing_package_is_no_failed_rung() -> None:
    def look(candidate: Candidate) -> Rung:
        raise MissingExtra("nncf", "openvino", purpose="x")

    with pytest.raises(MissingExtra):
        climb(_names("a"), look, lambda c, rung, level: rung)


def test_more_rungs_are_made_from_the_closest_one() -> None:
    outcome = _climb(
        _names("a", "b"),
        judged={"a": "FAIL", "b": "FAIL"},
        cosines={"a": 0.7, "b": 0.9, "b+": 0.95},
        more=lambda best, _: _careful(best.name + "+"),
    )
    assert _tried(outcome) == ["a", "b", "b+"]
    assert outcome.winner is not None and outcome.winner.name == "b+"


def test_more_rungs_know_what_was_tried_and_start_from_one_that_is_not_too_slow() -> None:
    seen: list[str] = []

    def more(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        seen.extend(c.name for c in tried)
        return _names(best.name + "+", quantiser=best.quantiser)

    outcome = _climb(
        [*_names("slow"), *_names("fast", quantiser="onnxruntime")],
        judged={"fast": "FAIL"},
        speeds={"slow": 0.5},
        cosines={"slow": 0.99, "fast+": 0.95},
        more=more,
    )
    assert outcome.winner is not None and outcome.winner.name == "fast+"
    assert seen == ["slow", "fast"]


def test_no_more_rungs_are_made_when_the_budget_is_spent() -> None:
    ticks = iter(range(0, 1000, 60))

    def never(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        raise AssertionError("sensitivity takes minutes, and the budget is spent")

    outcome = _climb(
        _names("a", "b"), judged={"a": "FAIL", "b": "FAIL"}, more=never, budget=100, clock=lambda: float(next(ticks))
    )
    assert _tried(outcome) == ["a", "b"]


def test_the_budget_ends_the_climb_but_what_was_tried_may_ship() -> None:
    ticks = iter(range(0, 1000, 60))
    outcome = _climb(_names("a", "b", "c", "d"), budget=100, clock=lambda: float(next(ticks)))
    assert 1 <= len(outcome.rungs) < 4
    assert outcome.winner is not None
