"""The gate, with made-up embeddings and clocks: what is broken fails, what is slower is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robx.errors import DeviceError, InputError
from robx.eval.fidelity.fidelity import make_bank
from robx.export.gate import gate
from robx.export.gate.gate import Limits, judge_accuracy, judge_speed
from robx.records import Value, Verdict

CLASSES, WIDTH = 5, 32


def _features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    labels = random.integers(0, CLASSES, count)
    return (centres[labels] + 0.3 * random.normal(size=(count, WIDTH)) + 5).astype(np.float32), labels


def _judge(candidate: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> tuple[Verdict, dict[str, Value], str]:
    bank = make_bank(*_features(300, 1), classes=CLASSES)
    return judge_accuracy(reference, candidate, labels=labels, bank=bank, limits=Limits(), level=0.05, precision="int8")


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


def test_why_a_model_is_not_run_here_names_no_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, _: object) -> None:
        raise DeviceError(f"{folder} cannot be run here: {folder}/model.plan needs a GPU")

    monkeypatch.setattr("robx.runtime.session.open_session", refuse)
    assert gate.open_judge(tmp_path / "tmpx1") == "the model cannot be run here: model.plan needs a GPU"
