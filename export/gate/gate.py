"""The gate: a candidate ships when it is accurate AND not slower, judged on held-out real images by what will run it.

Accuracy is eval's fidelity: a probe trained on fp32 features and frozen, kNN with an fp32 bank, centred cosine, NaN and
constant outputs; PASS, FAIL or INCONCLUSIVE by non-inferiority. Speed is a paired ratio to fp32 and to fp16 of the same
runtime, measured in interleaved blocks. Which of several candidates ships is decided in climb.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robx.errors import ArtifactError, DeviceError, InputError, MissingExtra
from robx.records import Precision, Value, Verdict
from robx.stats import worst

# Broken, whatever the labels say: easy classes can survive embeddings that nothing else would.
COSINE_FLOOR = 0.80
# A share of the speed asked for: what the clock cannot tell apart on a quiet machine.
SPEED_TOLERANCE = 0.03
_BLOCKS = 10
_BLOCK_SECONDS = 0.05

if TYPE_CHECKING:
    from robx.runtime.session import Session

Figures = tuple[Verdict, dict[str, Value], str]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate has to keep."""

    max_drop: float = 1.0  # points of accuracy, by non-inferiority
    min_speedup: float = 1.0  # against fp32 and against fp16

    def __post_init__(self) -> None:
        if not 0 < self.max_drop < 100:
            raise InputError(f"--max-drop {self.max_drop:g} is not between 0 and 100 points")
        if not self.min_speedup > 0:
            raise InputError(f"--min-speedup {self.min_speedup:g} is not positive")


def open_judge(folder: Path, *, batch: int | None = None) -> Session | str:
    """A bundle in the runtime that will run it, or the reason why this machine cannot.

    `batch` is that of every call, where it is always the same, as `robx bench` has it: an engine may plan for it.

    Raises:
        ArtifactError: the bundle itself is damaged.
    """
    from robx.runtime.session import SessionSettings, open_session

    try:
        return open_session(folder, SessionSettings(batch=batch))
    except (DeviceError, MissingExtra) as error:
        # The folder is gone when the reason is read.
        return str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the model")
    except ArtifactError as error:
        if "no engine" in str(error):  # a format that robx opens on no machine like this
            return str(error)
        raise


def make_bank(features: np.ndarray, labels: np.ndarray, *, classes: int) -> object:
    """What accuracy is judged with: fp32 features (N, D) of labelled images, and a probe trained on them."""
    from robx.eval.fidelity.fidelity import make_bank as make

    return make(features, labels, classes=classes)


def time_interleaved(
    sessions: Mapping[str, Session], images: np.ndarray, *, times: int = 1
) -> dict[str, list[np.ndarray]]:
    """Blocks of latencies in ns of each session, in random order, `times` as many as usual; for `judge_speed`."""
    from robx.runtime.bench.interleave import interleave

    return interleave(sessions, images, blocks=times * _BLOCKS, seconds=_BLOCK_SECONDS, seed=times)


def judge_accuracy(
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    labels: np.ndarray | None,
    bank: object | None,
    limits: Limits,
    level: float,
    precision: Precision,
    class_names: Sequence[str] | None = None,
) -> Figures:
    """Compare a candidate's embeddings (M, D) with the fp32 student's; the bank is eval's (``make_bank``).

    `level` is how often a drop as large as the limit may pass by chance.
    """
    from robx.eval.fidelity.fidelity import Bank, fidelity

    compared = fidelity(
        reference,
        candidate,
        labels=labels,
        bank=bank if isinstance(bank, Bank) else None,
        margin=limits.max_drop,
        level=level,
        precision=precision,
        class_names=class_names,
    )
    verdict, reasons = compared.verdict, list(compared.reasons)
    if (knn := compared.decisions.get("knn")) is not None and knn.verdict == "FAIL":
        verdict = "FAIL"
        reasons.insert(0, f"kNN: {knn.reasons[0]}")
    if (mean := compared.values["cosine_mean"].value) < COSINE_FLOOR:
        verdict = "FAIL"
        reasons.insert(0, f"centred cosine {mean:.3f}: the embeddings are others than the student's")
    return verdict, compared.values, reasons[0] if reasons else ""


def judge_speed(blocks: Mapping[str, list[np.ndarray]], limits: Limits) -> Figures:
    """Speed-ups of ``blocks["candidate"]`` against every other name ("fp32", "fp16"), from interleaved blocks.

    By non-inferiority, as accuracy is: PASS when every interval is above the minimum less what a clock cannot tell
    apart, FAIL when one is below, else INCONCLUSIVE. Two models of one speed pass, whichever comes out ahead.
    """
    from robx.runtime.bench.latency import paired_ratio

    values, verdicts, words = {}, [], []
    for name in (n for n in blocks if n != "candidate"):
        ratio = paired_ratio(blocks["candidate"], blocks[name])
        speedup = Value(value=1 / ratio.value, low=_inverse(ratio.high), high=_inverse(ratio.low), n=ratio.n)
        values[f"speedup_{name}"] = speedup
        verdicts.append(_speed_verdict(speedup, limits.min_speedup))
        words.append(f"{speedup.value:.2f}x {name}")
    verdict = worst(verdicts)
    said = " and ".join(words) or "no float model of the same runtime to be timed against"
    reason = f"{said} (at least {limits.min_speedup:g}x is asked for, within {SPEED_TOLERANCE:.0%})"
    if verdict == "INCONCLUSIVE" and verdicts:
        reason += "; the clock is too noisy to tell: run it on a quiet machine"
    milliseconds = float(np.median(np.concatenate(blocks["candidate"]))) / 1e6
    return verdict, values | {"latency": Value(value=milliseconds, unit="ms")}, reason


def _speed_verdict(speedup: Value, least: float) -> Verdict:
    low = speedup.value if speedup.low is None else speedup.low
    high = speedup.value if speedup.high is None else speedup.high
    least *= 1 - SPEED_TOLERANCE
    return "PASS" if low >= least else "FAIL" if high < least else "INCONCLUSIVE"


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value
