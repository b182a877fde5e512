"""The gate and the climb, with made-up embeddings and clocks: what is broken fails, what is slower is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from robx.errors import ArtifactError, DeviceError, InputError, MissingExtra
from robx.eval.fidelity import make_bank
from robx.export import gate
from robx.export.candidate import Candidate
from robx.export.gate import Limits, climb, judge_accuracy, judge_speed, ships
from robx.records import Rung, Value, Verdict

CLASSES, WIDTH = 5, 32


def _features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    labels = random.integers(0, CLASSES, count)
    return (centres[labels] + 0.3 * random.normal(size=(count, WIDTH)) + 5).astype(np.float32), labels


def _judge(candidate: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> tuple[Verdict, dict[str, Value], str]:
    bank = make_bank(*_features(300, 1), classes=CLASSES)
    return judge_accuracy(reference, candidate, labels=labels, bank=bank, limits=Limits(), precision="int8")


def test_the_same_embeddings_pass() -> None:
    reference, labels = _features(600, 2)
    verdict, values, _ = _judge(reference.copy(), reference, labels)
    assert verdict == "PASS"
    assert values["cosine_mean"].value == pytest.approx(1)
    assert values["knn_drop"].value == 0


def _constant(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x.mean(axis=0), x.shape).copy()


def _with_nan(x: np.ndarray) -> np.ndarray:
    broken = x.copy()
    broken[3, 0] = np.nan
    return broken


def _shuffled(x: np.ndarray) -> np.ndarray:
    return np.random.default_rng(3).permutation(x)


def _mean_alone(x: np.ndarray) -> np.ndarray:
    """Plain cosine with the reference stays above .99: what tools report as success."""
    return (x.mean(axis=0) + 0.05 * np.random.default_rng(4).normal(size=x.shape)).astype(np.float32)


@pytest.mark.parametrize("breaking", [_constant, _with_nan, _shuffled, _mean_alone])
def test_a_broken_candidate_fails(breaking) -> None:  # type: ignore[no-untyped-def]
    reference, labels = _features(600, 2)
    verdict, _, reason = _judge(breaking(reference), reference, labels)
    assert verdict == "FAIL"
    assert reason


def test_plain_cosine_would_have_passed_what_the_gate_refuses() -> None:
    reference, _ = _features(600, 2)
    other = _mean_alone(reference)
    plain = (reference * other).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(other, axis=1)
    assert plain.mean() > 0.97


def test_too_few_images_are_inconclusive_and_not_a_pass() -> None:
    reference, labels = _features(60, 2)
    noisy = reference + 0.02 * np.random.default_rng(5).normal(size=reference.shape).astype(np.float32)
    assert _judge(noisy, reference, labels)[0] == "INCONCLUSIVE"


def _blocks(milliseconds: float, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [(milliseconds * 1e6 * random.lognormal(0, 0.01, 30)).astype(np.int64) for _ in range(10)]


@pytest.mark.parametrize(
    ("candidate", "fp32", "fp16", "expected"),
    [(5, 10, 8, "PASS"), (12, 10, 14, "FAIL"), (9, 10, 7, "FAIL"), (5, 5, 5, "PASS")],
)
def test_speed_is_judged_against_fp32_and_fp16(candidate: float, fp32: float, fp16: float, expected: Verdict) -> None:
    blocks = {"candidate": _blocks(candidate, 1), "fp32": _blocks(fp32, 1), "fp16": _blocks(fp16, 1)}
    verdict, values, _ = judge_speed(blocks, Limits())
    assert verdict == expected
    assert values["speedup_fp32"].value == pytest.approx(fp32 / candidate, rel=0.02)
    assert values["speedup_fp16"].value == pytest.approx(fp16 / candidate, rel=0.02)


def _noisy(milliseconds: float, seed: int, noise: float) -> list[np.ndarray]:
    """Blocks whose level wanders by `noise`, as on a machine that is shared."""
    random = np.random.default_rng(seed)
    return [block * random.lognormal(0, noise) for block in _blocks(milliseconds, seed)]


def test_two_models_of_one_speed_pass_whichever_comes_out_ahead() -> None:
    for candidate, fp32 in ((5.0, 5.02), (5.02, 5.0)):
        blocks = {"candidate": _noisy(candidate, 1, 0.005), "fp32": _noisy(fp32, 2, 0.005)}
        assert judge_speed(blocks, Limits())[0] == "PASS"


def test_a_noisy_clock_is_inconclusive_and_says_what_to_do() -> None:
    verdict, _, reason = judge_speed({"candidate": _noisy(5, 1, 0.3), "fp32": _noisy(5, 2, 0.3)}, Limits())
    assert verdict == "INCONCLUSIVE"
    assert "quiet machine" in reason


def test_nothing_to_be_timed_against_is_said() -> None:
    verdict, values, reason = judge_speed({"candidate": _blocks(5, 1)}, Limits())
    assert verdict == "INCONCLUSIVE" and "speedup_fp32" not in values
    assert "no float model" in reason


def test_the_least_speedup_is_asked_for() -> None:
    blocks = {"candidate": _blocks(5, 1), "fp32": _blocks(9, 2)}
    assert judge_speed(blocks, Limits(min_speedup=1.5))[0] == "PASS"
    assert judge_speed(blocks, Limits(min_speedup=2.0))[0] == "FAIL"


@pytest.mark.parametrize("limits", [{"max_drop": 0}, {"max_drop": 100}, {"min_speedup": 0}, {"max_drop": -1}])
def test_senseless_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="--m"):
        Limits(**limits)


def _rung(candidate: Candidate, accuracy: Verdict, speedup: float | None, cosine: float = 0.9) -> Rung:
    values = {"cosine_mean": Value(value=cosine)}
    if speedup is not None:
        values["speedup_fp32"] = Value(value=speedup, low=speedup * 0.99, high=speedup * 1.01)
    speed: Verdict = "INCONCLUSIVE" if speedup is None else "PASS" if speedup >= 1 else "FAIL"
    return Rung(
        name=candidate.name, settings={}, precision="int8", accuracy=accuracy, speed=speed, values=values, reason=""
    )


def _names(*names: str, quantiser: str = "nncf") -> list[Candidate]:
    return [Candidate(name=n, quantiser=quantiser) for n in names]  # type: ignore[arg-type]


def test_the_climb_stops_at_the_first_rung_that_ships() -> None:
    verdicts: dict[str, Verdict] = {"a": "FAIL", "b": "PASS", "c": "PASS"}
    outcome = climb(_names("a", "b", "c"), lambda c: _rung(c, verdicts[c.name], 2.0))
    assert [r.name for r in outcome.rungs] == ["a", "b"]
    assert [r.kept for r in outcome.rungs] == [False, True]
    assert outcome.winner is not None and outcome.winner.name == "b"


@pytest.mark.parametrize("accuracy", ["FAIL", "INCONCLUSIVE"])
def test_nothing_ships_without_proof(accuracy: Verdict) -> None:
    outcome = climb(_names("a", "b"), lambda c: _rung(c, accuracy, 2.0, cosine={"a": 0.8, "b": 0.7}[c.name]))
    assert outcome.winner is None
    assert outcome.best is not None and outcome.best.name == "a"
    assert not any(r.kept for r in outcome.rungs)


def test_an_accurate_rung_that_is_slower_is_refused_and_its_kin_are_not_tried() -> None:
    candidates = [*_names("a", "b"), *_names("c", quantiser="onnxruntime")]
    outcome = climb(candidates, lambda c: _rung(c, "PASS", {"a": 0.5, "b": 2.0, "c": 1.5}[c.name]))
    assert [r.name for r in outcome.rungs] == ["a", "c"]
    assert outcome.winner is not None and outcome.winner.name == "c"


def test_an_unmeasurable_speed_does_not_stop_an_accurate_rung() -> None:
    assert ships(_rung(Candidate(name="a"), "PASS", None))
    assert not ships(_rung(Candidate(name="a"), "INCONCLUSIVE", None))


def test_a_candidate_that_cannot_be_built_is_a_failed_rung_and_the_climb_goes_on() -> None:
    def try_rung(candidate: Candidate) -> Rung:
        if candidate.name == "a":
            raise ArtifactError("cannot")
        return _rung(candidate, "PASS", 2.0)

    told: list[Rung] = []
    outcome = climb(_names("a", "b"), try_rung, on_rung=told.append)
    assert [r.name for r in told] == ["a", "b"]
    assert outcome.rungs[0].accuracy == "FAIL" and "cannot" in outcome.rungs[0].reason
    assert outcome.winner is not None and outcome.winner.name == "b"


def test_a_missing_package_is_no_failed_rung() -> None:
    def try_rung(candidate: Candidate) -> Rung:
        raise MissingExtra("nncf", "openvino", purpose="x")

    with pytest.raises(MissingExtra):
        climb(_names("a"), try_rung)


def test_more_rungs_are_made_from_the_most_accurate_one() -> None:
    cosines = {"a": 0.7, "b": 0.9, "b+": 0.95}
    outcome = climb(
        _names("a", "b"),
        lambda c: _rung(c, "PASS" if c.name == "b+" else "FAIL", 2.0, cosines[c.name]),
        more=lambda best, _: _names(best.name + "+"),
    )
    assert [r.name for r in outcome.rungs] == ["a", "b", "b+"]
    assert outcome.winner is not None and outcome.winner.name == "b+"


def test_more_rungs_know_what_was_tried_and_start_from_one_that_is_not_too_slow() -> None:
    cosines = {"slow": 0.99, "fast": 0.9, "fast+": 0.95}
    seen: list[str] = []

    def more(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        seen.extend(c.name for c in tried)
        return _names(best.name + "+", quantiser=best.quantiser)

    told: list[Rung] = []
    outcome = climb(
        [*_names("slow"), *_names("fast", quantiser="onnxruntime")],
        lambda c: _rung(c, "PASS" if c.name == "fast+" else "FAIL", 0.5 if c.name == "slow" else 2.0, cosines[c.name]),
        more=more,
        on_rung=told.append,
    )
    assert outcome.winner is not None and outcome.winner.name == "fast+"
    assert seen == ["slow", "fast"]
    assert [r.name for r in told] == ["slow", "fast", "fast+"]


def test_no_more_rungs_are_made_when_the_budget_is_spent() -> None:
    ticks = iter(range(0, 1000, 60))

    def never(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        raise AssertionError("sensitivity takes minutes, and the budget is spent")

    outcome = climb(
        _names("a", "b"), lambda c: _rung(c, "FAIL", 2.0), more=never, budget=100, clock=lambda: float(next(ticks))
    )
    assert [r.name for r in outcome.rungs] == ["a", "b"]


def test_the_budget_ends_the_climb_but_lets_one_rung_be_tried() -> None:
    ticks = iter(range(0, 1000, 60))
    outcome = climb(
        _names("a", "b", "c", "d"), lambda c: _rung(c, "FAIL", 2.0), budget=100, clock=lambda: float(next(ticks))
    )
    assert 1 <= len(outcome.rungs) < 4


def test_why_a_model_is_not_run_here_names_no_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise DeviceError(f"{folder} cannot be run here: {folder}/model.plan needs a GPU")

    monkeypatch.setattr("robx.runtime.session.open_session", refuse)
    assert gate.open_judge(tmp_path / "tmpx1") == "the model cannot be run here: model.plan needs a GPU"
