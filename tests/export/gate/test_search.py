"""The search, with made-up trials: the best accurate candidate ships, and luck on the judging images does not help."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robx.errors import ArtifactError, MissingExtra, NoSpace
from robx.export.gate.search import Outcome, Steps, Trial, attempt, level_of, preference, search
from robx.export.int8.candidate import Candidate, NotTried
from robx.records import Value, Verdict
from robx.stats import non_inferiority

Verdicts = dict[str, Verdict]


def _trial(candidate: Candidate, accuracy: Verdict, speedup: float | None, cosine: float = 0.9) -> Trial:
    """The result of a look at a candidate."""
    values = {"cosine_mean": Value(value=cosine), "screen_cosine": Value(value=cosine), "screened": Value(value=400)}
    if speedup is not None:
        values["speedup_fp32"] = Value(value=speedup, low=speedup * 0.99, high=speedup * 1.01)
    speed: Verdict = "INCONCLUSIVE" if speedup is None else "PASS" if speedup >= 1 else "FAIL"
    return Trial(
        candidate=candidate,
        accuracy=accuracy,
        speed=speed,
        is_fast=speed != "FAIL",
        values=values,
        accuracy_reasons=("screened",),
    )


def test_a_ratio_from_a_busy_machine_does_not_choose_the_candidate() -> None:
    near, far = _forms("near", "far")
    closer, absurd = _trial(near, "PASS", 2.0, 0.99), replace(_trial(far, "PASS", 500.0, 0.9), speed="INCONCLUSIVE")
    assert [trial.candidate.name for trial in preference([absurd, closer])] == ["near", "far"]
    busy = replace(closer, speed="INCONCLUSIVE")
    assert [trial.candidate.name for trial in preference([absurd, busy])] == ["near", "far"]
    timed = replace(absurd, speed="PASS")
    assert [trial.candidate.name for trial in preference([timed, closer])] == ["far", "near"]


def _judged(trial: Trial, accuracy: Verdict) -> Trial:
    values = {name: value for name, value in trial.values.items() if name != "screened"}
    return replace(trial, accuracy=accuracy, values=values)


def _none(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
    return []


def _names(*names: str, quantiser: str = "nncf", **settings: Any) -> list[Candidate]:
    return [Candidate(name=n, quantiser=quantiser, **settings) for n in names]  # type: ignore[arg-type]


def _forms(*names: str) -> list[Candidate]:
    """Candidates whose graphs differ."""
    return [Candidate(name=n, quantiser="nncf", smooth_alpha=0.1 * i) for i, n in enumerate(names)]


def _careful(*names: str) -> list[Candidate]:
    return _names(*names, float_nodes=("stem",))


def _search(
    candidates: Sequence[Candidate],
    *,
    screened: Verdicts | None = None,
    judged: Verdicts | None = None,
    speeds: dict[str, float] | None = None,
    cosines: dict[str, float] | None = None,
    race: Callable[[Sequence[Trial]], Sequence[Trial]] = list,
    more: Callable[[Candidate, Sequence[Candidate]], Sequence[Candidate]] = _none,
    **settings: Any,
) -> Outcome:
    """A search in which every candidate is promising, accurate, twice as fast and equally close, unless given."""

    def look(candidate: Candidate) -> Trial:
        name = candidate.name
        verdict: Verdict = (screened or {}).get(name, "INCONCLUSIVE")
        return _trial(candidate, verdict, (speeds or {}).get(name, 2.0), (cosines or {}).get(name, 0.9))

    def judge(trial: Trial, level: float) -> Trial:
        return _judged(trial, (judged or {}).get(trial.candidate.name, "PASS"))

    return search(candidates, Steps(look=look, judge=judge, race=race, more=more), **settings)


def _tried(outcome: Outcome) -> list[str]:
    return [trial.candidate.name for trial in outcome.trials]


def test_the_fastest_ships_and_of_equally_fast_ones_the_closest() -> None:
    speeds = {"a": 1.5, "b": 2.0, "c": 1.99, "d": 2.02}
    cosines = {"a": 0.99, "b": 0.93, "c": 0.97, "d": 0.95}
    outcome = _search(_forms("a", "b", "c", "d"), speeds=speeds, cosines=cosines)
    assert outcome.winner is not None and outcome.winner.name == "c"
    assert [t.kept for t in outcome.trials] == [False, False, True, False]


def test_noise_in_timing_does_not_choose_among_candidates_of_one_graph() -> None:
    speeds = {"a": 2.0, "b": 2.2, "c": 1.9}
    outcome = _search(_names("a", "b", "c"), speeds=speeds, cosines={"a": 0.95, "b": 0.91, "c": 0.97})
    assert outcome.winner is not None and outcome.winner.name == "c"


def test_promising_candidates_are_timed_side_by_side_and_that_decides() -> None:
    raced: list[list[str]] = []

    def race(trials: Sequence[Trial]) -> list[Trial]:
        raced.append([trial.candidate.name for trial in trials])
        speeds = {"a": 2.0, "b": 1.5, "d": 0.9}
        return [_trial(t.candidate, "INCONCLUSIVE", speeds[t.candidate.name]) for t in trials]

    looked = {"a": 1.9, "b": 2.3, "c": 9.0, "d": 3.0}  # of different minutes
    outcome = _search(_forms("a", "b", "c", "d"), speeds=looked, screened={"c": "FAIL"}, race=race)
    assert raced == [["a", "b", "d"]]
    assert outcome.winner is not None and outcome.winner.name == "a" and outcome.judged == 1
    found = {t.candidate.name: t for t in outcome.trials}
    assert {k: t.values["speedup_fp32"].value for k, t in found.items()} == {"a": 2.0, "b": 1.5, "c": 9.0, "d": 0.9}
    assert found["d"].speed == "FAIL"
    assert _search(_names("a"), race=race).winner is not None and len(raced) == 1  # a single one is not timed again


def test_what_lost_too_much_in_screening_is_judged_last() -> None:
    def screened(candidate: Candidate, drop: float, cosine: float) -> Trial:
        trial = _trial(candidate, "INCONCLUSIVE", 2.0, cosine)
        return replace(trial, values=trial.values | {"probe_drop": Value(value=drop)})

    a, b, c = _names("a", "b", "c")
    trials = [screened(a, 4.1, 0.99), screened(b, 0.3, 0.95), screened(c, 2.2, 0.97)]
    assert [t.candidate.name for t in preference(trials, margin=3)] == ["c", "b", "a"]
    assert [t.candidate.name for t in preference(trials, margin=5)] == ["a", "c", "b"]
    # Measured on few images, 4.1 points with a standard error of 1.5 are not surely more than 3.
    unsure = replace(trials[0], values=trials[0].values | {"probe_drop": Value(value=4.1, low=1.16, high=7.04)})
    assert [t.candidate.name for t in preference([unsure, *trials[1:]], margin=3)] == ["a", "c", "b"]
    assert [t.candidate.name for t in preference([unsure, *trials[1:]], margin=2.5)] == ["c", "b", "a"]


def test_only_one_candidate_is_judged_when_it_passes() -> None:
    outcome = _search(_names("a", "b", "c"), cosines={"b": 0.95})
    assert outcome.judged == 1
    assert [trial.was_judged for trial in outcome.trials] == [False, True, False]


def test_when_the_best_fails_the_next_best_is_judged_at_a_stricter_level() -> None:
    levels: list[float] = []

    def judge(trial: Trial, level: float) -> Trial:
        levels.append(level)
        return _judged(trial, "PASS" if trial.candidate.name == "a" else "FAIL")

    speeds = {"a": 1.5, "b": 3.0, "c": 2.0}
    steps = Steps(look=lambda c: _trial(c, "PASS", speeds[c.name]), judge=judge, race=list, more=_none)
    outcome = search(_forms("a", "b", "c"), steps)
    assert outcome.winner is not None and outcome.winner.name == "a" and outcome.judged == 3
    assert levels == [level_of(1), level_of(2), level_of(3)]


def test_the_levels_add_up_to_five_percent() -> None:
    assert level_of(1) == pytest.approx(0.025)
    assert math.fsum(level_of(k) for k in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_trying_many_inaccurate_candidates_ships_one_as_rarely_as_it_says() -> None:
    """Eight candidates that lose exactly the margin, each with errors of its own: the worst that chance can do."""
    random = np.random.default_rng(0)
    n, margin, shipped, first_alone = 400, 5.0, 0, 0
    for _ in range(400):
        lost = {c.name: random.multinomial(n, [0.08, 0.03, 0.89]) for c in _names(*"abcdefgh")}

        def judge(trial: Trial, level: float, lost: Any = lost) -> Trial:
            b, c, same = lost[trial.candidate.name]
            reference = np.repeat([True, False, True], [b, c, same])
            answer = np.repeat([False, True, True], [b, c, same])
            return _judged(trial, non_inferiority(reference, answer, margin, level=level).verdict)

        steps = Steps(look=lambda c: _trial(c, "INCONCLUSIVE", 2.0), judge=judge, race=list, more=_none)
        shipped += search(_names(*"abcdefgh"), steps).winner is not None
        plain = [judge(_trial(c, "PASS", 2.0), 0.05) for c in _names(*"abcdefgh")]
        first_alone += any(trial.accuracy == "PASS" for trial in plain)
    assert shipped / 400 < 0.075  # 5 % and what 400 draws leave to chance
    assert first_alone / 400 > 0.2  # what taking the first that passes at 5 % would have shipped


def test_what_screening_finds_broken_is_never_judged() -> None:
    outcome = _search(_names("a", "b"), screened={"a": "FAIL"}, speeds={"a": 9.0})
    assert outcome.winner is not None and outcome.winner.name == "b" and outcome.judged == 1


def test_careful_candidates_wait_and_are_tried_when_the_plain_ones_fail() -> None:
    candidates = [*_names("plain"), *_careful("careful")]
    assert _tried(_search(candidates)) == ["plain"]
    rescued = _search(candidates, judged={"plain": "FAIL"})
    assert _tried(rescued) == ["plain", "careful"]
    assert rescued.winner is not None and rescued.winner.name == "careful"
    straight = _search(candidates, screened={"plain": "FAIL"})
    assert straight.winner is not None and straight.winner.name == "careful" and straight.judged == 1


def test_a_careful_candidate_that_may_be_faster_does_not_wait_for_a_promising_one() -> None:
    """After the plain one failed, full bias correction (all int8) is worth a look beside the stem in float."""
    candidates = [*_names("plain"), *_careful("stem in float"), *_names("full bias", full_bias=True)]
    speeds = {"plain": 2.0, "stem in float": 1.5, "full bias": 2.0}
    outcome = _search(candidates, judged={"plain": "FAIL"}, speeds=speeds)
    assert _tried(outcome) == ["plain", "stem in float", "full bias"]
    assert outcome.winner is not None and outcome.winner.name == "full bias"


@pytest.mark.parametrize("accuracy", ["FAIL", "INCONCLUSIVE"])
def test_nothing_ships_without_proof(accuracy: Verdict) -> None:
    outcome = _search(_names("a", "b"), judged={"a": accuracy, "b": accuracy}, cosines={"a": 0.8, "b": 0.7})
    assert outcome.winner is None and outcome.judged == 2
    assert outcome.best is not None and outcome.best.name == "a"
    assert not any(t.kept for t in outcome.trials)


def test_a_slower_candidate_fails_and_the_rest_of_its_family_is_not_tried() -> None:
    candidates = [*_names("a", "b"), *_names("c", quantiser="onnxruntime")]
    outcome = _search(candidates, speeds={"a": 0.5, "b": 2.0, "c": 1.5})
    assert _tried(outcome) == ["a", "c"]
    assert outcome.winner is not None and outcome.winner.name == "c"


def test_a_slow_one_stops_those_that_leave_more_in_float_and_no_other_graph() -> None:
    slow, other = _forms("slow", "other")
    kin = replace(slow, name="kin", float_nodes=("stem",))
    outcome = _search([slow, kin, other], speeds={"slow": 0.5})
    assert _tried(outcome) == ["slow", "other"]
    assert outcome.winner is not None and outcome.winner.name == "other"


def test_an_unmeasurable_speed_does_not_stop_an_accurate_candidate() -> None:
    trial = _trial(Candidate(name="a"), "PASS", None)
    assert not trial.ships  # only screened
    assert _judged(trial, "PASS").ships and not _judged(trial, "INCONCLUSIVE").ships
    a, b = _names("a", "b")
    order = preference([_trial(a, "PASS", None, 0.8), _trial(b, "PASS", None, 0.9)])
    assert [t.candidate.name for t in order] == ["b", "a"]


@pytest.mark.parametrize("when", ["looked at", "judged"])
def test_a_candidate_that_cannot_be_run_has_failed_and_the_search_continues(when: str) -> None:
    def look(candidate: Candidate) -> Trial:
        if candidate.name == "a" and when == "looked at":
            raise ArtifactError("cannot")
        return _trial(candidate, "PASS", 2.0)

    def judge(trial: Trial, level: float) -> Trial:
        if trial.candidate.name == "a":
            raise ArtifactError("cannot")
        return _judged(trial, "PASS")

    told: list[Trial] = []
    outcome = search(_names("a", "b"), Steps(look=look, judge=judge, race=list, more=_none, told=told.append))
    assert [t.candidate.name for t in told] == (["a", "b", "b"] if when == "looked at" else ["a", "b", "a", "b"])
    assert outcome.trials[0].accuracy == "FAIL" and "cannot" in outcome.trials[0].record().reason
    assert outcome.winner is not None and outcome.winner.name == "b"


def test_a_missing_package_is_not_a_failed_candidate() -> None:
    def look(candidate: Candidate) -> Trial:
        raise MissingExtra("nncf", "openvino", purpose="x")

    with pytest.raises(MissingExtra):
        search(_names("a"), Steps(look=look, judge=lambda trial, level: trial, race=list, more=_none))


def test_more_candidates_are_made_from_the_closest_one() -> None:
    outcome = _search(
        _names("a", "b"),
        judged={"a": "FAIL", "b": "FAIL"},
        cosines={"a": 0.7, "b": 0.9, "b+": 0.95},
        more=lambda best, _: _careful(best.name + "+"),
    )
    assert _tried(outcome) == ["a", "b", "b+"]
    assert outcome.winner is not None and outcome.winner.name == "b+"


def test_more_candidates_know_what_was_tried_and_start_from_one_that_is_not_too_slow() -> None:
    seen: list[str] = []

    def more(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        seen.extend(c.name for c in tried)
        return _names(best.name + "+", quantiser=best.quantiser)

    outcome = _search(
        [*_names("slow"), *_names("fast", quantiser="onnxruntime")],
        judged={"fast": "FAIL"},
        speeds={"slow": 0.5},
        cosines={"slow": 0.99, "fast+": 0.95},
        more=more,
    )
    assert outcome.winner is not None and outcome.winner.name == "fast+"
    assert seen == ["slow", "fast"]


def test_no_more_candidates_are_made_when_the_budget_is_spent() -> None:
    ticks = iter(range(0, 1000, 60))

    def never(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        raise AssertionError("sensitivity takes minutes, and the budget is spent")

    outcome = _search(
        _names("a", "b"), judged={"a": "FAIL", "b": "FAIL"}, more=never, budget=100, clock=lambda: float(next(ticks))
    )
    assert _tried(outcome) == ["a", "b"]


def test_the_budget_ends_the_search_but_what_was_tried_may_ship() -> None:
    ticks = iter(range(0, 1000, 60))
    outcome = _search(_names("a", "b", "c", "d"), budget=100, clock=lambda: float(next(ticks)))
    assert 1 <= len(outcome.trials) < 4
    assert outcome.winner is not None


def test_a_candidate_without_what_it_is_made_from_is_not_tried_and_has_no_verdict() -> None:
    def step(error: Exception) -> Callable[[], Trial]:
        def fail() -> Trial:
            raise error

        return fail

    left_out = attempt(Candidate(name="a, healed", healed=True), step(NotTried("healing was in vain")))
    rung = left_out.record()
    assert (rung.accuracy, rung.speed, rung.accuracy_said) == ("INCONCLUSIVE", "INCONCLUSIVE", "not tried")
    assert rung.reason == "not tried: healing was in vain" and not (left_out.is_promising or left_out.ships)
    broken = attempt(Candidate(name="a"), step(ArtifactError("no such layer"))).record()
    assert (broken.accuracy, broken.accuracy_said, broken.reason) == ("FAIL", "error", "failed: no such layer")
    with pytest.raises(NoSpace):
        attempt(Candidate(name="a"), step(NoSpace("no space left")))
