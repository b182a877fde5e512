"""The gate, with made-up embeddings and latencies: a broken candidate fails, and so does a slower one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from robx.errors import DeviceError, InputError
from robx.eval.fidelity.fidelity import make_bank
from robx.export.gate.gate import Judgement, Limits, judge_accuracy, judge_speed
from robx.export.gate.judge import SCREEN_LEVEL
from robx.export.gate.sessions import open_candidate
from robx.records import Verdict

CLASSES, WIDTH = 5, 32


def _features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    labels = random.integers(0, CLASSES, count)
    return (centres[labels] + 0.3 * random.normal(size=(count, WIDTH)) + 5).astype(np.float32), labels


def _judge(candidate: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> Judgement:
    bank = make_bank(*_features(300, 1), classes=CLASSES)
    return judge_accuracy(reference, candidate, labels=labels, bank=bank, limits=Limits(), level=0.05, precision="int8")


def test_the_same_embeddings_pass() -> None:
    reference, labels = _features(600, 2)
    judged = _judge(reference.copy(), reference, labels)
    assert judged.verdict == "PASS"
    assert judged.values["cosine_mean"].value == pytest.approx(1)
    assert judged.values["knn_drop"].value == 0


def _constant(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x.mean(axis=0), x.shape).copy()


def _with_nan(x: np.ndarray) -> np.ndarray:
    broken = x.copy()
    broken[3, 0] = np.nan
    return broken


def _shuffled(x: np.ndarray) -> np.ndarray:
    return np.random.default_rng(3).permutation(x)


def _mean_alone(x: np.ndarray) -> np.ndarray:
    """Plain cosine with the reference stays above .99: which other tools report as success."""
    return (x.mean(axis=0) + 0.05 * np.random.default_rng(4).normal(size=x.shape)).astype(np.float32)


def test_screening_seldom_sets_a_sound_candidate_aside() -> None:
    """A candidate that loses .7 points of the tolerated 1, on as few labelled images as screening may have."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, WIDTH))

    def features(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, CLASSES, count)
        return (centres[labels] + 2 * random.normal(size=(count, WIDTH))).astype(np.float32), labels

    bank, aside, drops, rounds = make_bank(*features(600), classes=CLASSES), 0, [], 100
    for _ in range(rounds):
        reference, labels = features(239)
        candidate = reference + 0.35 * random.normal(size=reference.shape).astype(np.float32)
        judged = judge_accuracy(
            reference, candidate, labels=labels, bank=bank, limits=Limits(), level=SCREEN_LEVEL, precision="int8"
        )
        aside += judged.verdict == "FAIL"
        drops.append(judged.values["probe_drop"].value)
    assert 0 < np.mean(drops) < 1
    assert aside <= 0.07 * rounds


@pytest.mark.parametrize("breaking", [_constant, _with_nan, _shuffled, _mean_alone])
def test_a_broken_candidate_fails(breaking) -> None:  # type: ignore[no-untyped-def]
    reference, labels = _features(600, 2)
    judged = _judge(breaking(reference), reference, labels)
    assert judged.verdict == "FAIL"
    assert judged.reasons and all(judged.reasons)


def test_plain_cosine_would_have_passed_what_the_gate_refuses() -> None:
    reference, _ = _features(600, 2)
    other = _mean_alone(reference)
    plain = (reference * other).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(other, axis=1)
    assert plain.mean() > 0.97


def test_too_few_images_are_inconclusive_and_not_a_pass() -> None:
    reference, labels = _features(60, 2)
    noisy = reference + 0.02 * np.random.default_rng(5).normal(size=reference.shape).astype(np.float32)
    assert _judge(noisy, reference, labels).verdict == "INCONCLUSIVE"


def _blocks(milliseconds: float, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [(milliseconds * 1e6 * random.lognormal(0, 0.01, 30)).astype(np.int64) for _ in range(10)]


@pytest.mark.parametrize(
    ("candidate", "fp32", "fp16", "expected"),
    [(5, 10, 8, "PASS"), (12, 10, 14, "FAIL"), (9, 10, 7, "FAIL"), (5, 5, 5, "PASS")],
)
def test_speed_is_judged_against_fp32_and_fp16(candidate: float, fp32: float, fp16: float, expected: Verdict) -> None:
    blocks = {"candidate": _blocks(candidate, 1), "fp32": _blocks(fp32, 1), "fp16": _blocks(fp16, 1)}
    judged = judge_speed(blocks, Limits())
    assert judged.verdict == expected
    assert judged.values["speedup_fp32"].value == pytest.approx(fp32 / candidate, rel=0.02)
    assert judged.values["speedup_fp16"].value == pytest.approx(fp16 / candidate, rel=0.02)


def _noisy(milliseconds: float, seed: int, noise: float) -> list[np.ndarray]:
    """Blocks whose level drifts by `noise`, as on a shared machine."""
    random = np.random.default_rng(seed)
    return [block * random.lognormal(0, noise) for block in _blocks(milliseconds, seed)]


def test_two_models_of_one_speed_pass_whichever_comes_out_ahead() -> None:
    for candidate, fp32 in ((5.0, 5.02), (5.02, 5.0)):
        blocks = {"candidate": _noisy(candidate, 1, 0.005), "fp32": _noisy(fp32, 2, 0.005)}
        assert judge_speed(blocks, Limits()).verdict == "PASS"


def test_a_noisy_clock_is_inconclusive_and_says_what_to_do() -> None:
    judged = judge_speed({"candidate": _noisy(5, 1, 0.3), "fp32": _noisy(5, 2, 0.3)}, Limits())
    assert judged.verdict == "INCONCLUSIVE"
    assert "quiet machine" in judged.reasons[-1]


def test_a_missing_baseline_is_reported() -> None:
    judged = judge_speed({"candidate": _blocks(5, 1)}, Limits())
    assert judged.verdict == "INCONCLUSIVE" and "speedup_fp32" not in judged.values
    assert "no float model" in judged.reasons[0]


def test_the_minimum_speedup_is_a_setting() -> None:
    blocks = {"candidate": _blocks(5, 1), "fp32": _blocks(9, 2)}
    assert judge_speed(blocks, Limits(min_speedup=1.5)).verdict == "PASS"
    assert judge_speed(blocks, Limits(min_speedup=2.0)).verdict == "FAIL"


@pytest.mark.parametrize("limits", [{"max_drop": 0}, {"max_drop": 100}, {"min_speedup": 0}, {"max_drop": -1}])
def test_limits_out_of_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="--m"):
        Limits(**limits)


def test_the_reason_for_not_running_a_model_hides_the_scratch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, _: object) -> None:
        raise DeviceError(f"{folder} cannot be run here: {folder}/model.plan needs a GPU")

    monkeypatch.setattr("robx.runtime.session.open_session", refuse)
    monkeypatch.setattr("robx.export.gate.sessions.load_bundle", lambda _: SimpleNamespace(runtime="tensorrt"))
    assert open_candidate(tmp_path / "tmpx1") == "the model cannot be run here: model.plan needs a GPU"


def test_a_busy_machine_proves_nothing_about_speed() -> None:
    """The ratio may be far from the truth (41.9x by wall-clock time where CPU time says 7.5x): it is not a PASS."""
    load = ["background_load: other processes took 90 % of a core", "cpu_wait: the model had a CPU core for 40 %"]
    for milliseconds, fast in ((5.0, True), (12.0, False)):
        blocks = {"candidate": _blocks(milliseconds, 1), "fp32": _blocks(9, 2)}
        judged = judge_speed(blocks, Limits(), disturbances=load)
        assert judged.verdict == "INCONCLUSIVE" and judged.is_fast is fast
        assert judged.reasons[-1].startswith("timing UNSTABLE: background_load: other processes took 90 % of a core")
        assert "1 more" in judged.reasons[-1] and "quiet machine" in judged.reasons[-1]
        assert judge_speed(blocks, Limits()).verdict == ("PASS" if fast else "FAIL")
