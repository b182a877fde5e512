"""The gate: a candidate ships when it is accurate AND not slower, judged on held-out real images in its own runtime.

Accuracy is eval's fidelity: a probe trained on fp32 features and frozen, kNN with an fp32 bank, centred cosine, NaN and
constant outputs; PASS, FAIL or INCONCLUSIVE by non-inferiority. Speed is a paired ratio to fp32 and fp16 in the same
runtime, measured in interleaved blocks, and it proves nothing unless the machine was quiet, by the verdict that `robx
bench` uses. Which of several candidates ships is decided in search.py. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robx.errors import GateFailed, InputError
from robx.export.image_splits import MIN_IMAGES
from robx.records import Bundle, Precision, Rung, Value, Verdict
from robx.stats import worst

# Below this, a candidate is broken whatever the labels say: easy classes survive even embeddings that are useless.
COSINE_FLOOR = 0.80
# A share of the speed asked for: what timing on a quiet machine cannot resolve.
SPEED_TOLERANCE = 0.03

if TYPE_CHECKING:
    from robx.eval.fidelity.fidelity import Bank


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate has to achieve."""

    max_drop: float = 1.0  # points of accuracy that may be lost, by non-inferiority
    min_speedup: float = 1.0  # against fp32 and against fp16

    def __post_init__(self) -> None:
        if not 0 < self.max_drop < 100:
            raise InputError(f"--max-drop must be between 0 and 100 points, got {self.max_drop:g}")
        if not 0 < self.min_speedup < math.inf:
            raise InputError(f"--min-speedup must be positive, got {self.min_speedup:g}")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict on accuracy or on speed, its figures, and the reasons in words."""

    verdict: Verdict
    values: dict[str, Value]
    reasons: tuple[str, ...]
    is_fast: bool = True  # of speed: what was measured suffices, though an UNSTABLE timing does not prove it


def judge_accuracy(
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    labels: np.ndarray | None,
    bank: Bank | None,
    limits: Limits,
    level: float,
    precision: Precision,
    class_names: Sequence[str] | None = None,
) -> Judgement:
    """Compare a candidate's embeddings (M, D) with the fp32 student's of the same images.

    Args:
        reference: the fp32 student's embeddings (M, D).
        candidate: the candidate's (M, D).
        labels: int64 (M,) in the bank's numbering, -1 where unknown; None without a bank.
        bank: labelled fp32 features and the probe trained on them (``eval.fidelity``); None without labels.
        limits: the drop that is tolerated.
        level: the probability that a drop as large as the limit passes by chance.
        precision: the candidate's; it sets the cosine limits that decide without labels.
        class_names: names for the reasons.
    """
    from robx.eval.fidelity.fidelity import fidelity

    compared = fidelity(
        reference,
        candidate,
        labels=labels,
        bank=bank,
        margin=limits.max_drop,
        level=level,
        precision=precision,
        class_names=class_names,
    )
    failures = []
    if (mean := compared.values["cosine_mean"].value) < COSINE_FLOOR:
        failures.append(f"centred cosine {mean:.3f} is below {COSINE_FLOOR:.2f}: not the student's embeddings any more")
    if (knn := compared.decisions.get("knn")) is not None and knn.verdict == "FAIL":
        failures.append(f"kNN: {knn.reasons[0]}")
    return Judgement(
        verdict="FAIL" if failures else compared.verdict,
        values=compared.values,
        reasons=tuple(failures) or compared.reasons[:1],
    )


def judge_speed(
    blocks: Mapping[str, list[np.ndarray]], limits: Limits, *, disturbances: Sequence[str] = ()
) -> Judgement:
    """Speed-ups of ``blocks["candidate"]`` against every other name ("fp32", "fp16"), from interleaved blocks.

    By non-inferiority, as for accuracy: PASS when every interval lies above the minimum less the tolerance of timing,
    FAIL when one lies below, else INCONCLUSIVE. Two models of equal speed pass, whichever comes out ahead. On a machine
    that was not quiet the verdict is INCONCLUSIVE, whatever the ratio, and the reason does not quote it.

    Args:
        blocks: name -> latencies in ns, int64 (n_i,) for each block; the same number of blocks for every name.
        limits: the speed-up asked for.
        disturbances: "code: text" for everything that makes the timing UNSTABLE (``runtime.bench.validity``).
    """
    from robx.runtime.bench import validity
    from robx.runtime.bench.latency import paired_ratio

    values, verdicts, words = {}, list[Verdict](), []
    for name in (n for n in blocks if n != "candidate"):
        ratio = paired_ratio(blocks["candidate"], blocks[name])
        speedup = Value(value=1 / ratio.value, low=_inverse(ratio.high), high=_inverse(ratio.low), n=ratio.n)
        values[f"speedup_{name}"] = speedup
        verdicts.append(_speed_verdict(speedup, limits.min_speedup))
        words.append(f"{speedup.value:.2f}x {name}")
    milliseconds = float(np.median(np.concatenate(blocks["candidate"]))) / 1e6
    values["latency"] = Value(value=milliseconds, unit="ms")
    if not verdicts:
        return Judgement(
            verdict="INCONCLUSIVE", values=values, reasons=("there is no float model in this runtime to compare with",)
        )
    verdict = worst(verdicts)
    reasons = [f"{' and '.join(words)} (at least {limits.min_speedup:g}x is required, within {SPEED_TOLERANCE:.0%})"]
    is_fast = verdict == "PASS"
    if (validity_of := validity.verdict(disturbances)) != "VALID":
        verdict = "INCONCLUSIVE"
        more = f" (and {len(disturbances) - 1} more)" if len(disturbances) > 1 else ""
        # Without the ratio, which may be far from the truth.
        reasons = [f"timing {validity_of}: {disturbances[0]}{more}; measure again on a quiet machine"]
    elif verdict == "INCONCLUSIVE":
        reasons.append("the timing is too noisy to decide: run it again on a quiet machine")
    return Judgement(verdict=verdict, values=values, reasons=tuple(reasons), is_fast=is_fast)


def gate_error(
    bundle: Bundle, folder: Path, *, most: int | None = None, budget: float | None = None
) -> GateFailed | None:
    """The error that ends an export whose bundle is not in the precision asked for; None otherwise, or with --force.

    Args:
        bundle: the record of what was shipped.
        folder: where it was written.
        most: --rungs, the number of int8 candidates that the search was limited to; None: not limited.
        budget: --budget, the seconds that it was limited to; None: not limited.
    """
    if bundle.precision == bundle.requested or bundle.verdict == "FORCED":
        return None
    tried = [rung for rung in bundle.rungs if rung.precision == bundle.requested]
    if not any(rung.values for rung in tried):
        first = tried[0].reason if tried else "none was tried"
        advice = f"none could be built or run ({first}); choose another --format or --target"
    elif len(tried) == 1 and _overflows(tried[0]):
        advice = tried[0].reason
    else:
        searches = _better_searches(bundle, len(tried), most, budget)
        healing = ", train weights that tolerate int8 with --heal" if healing_could_help(bundle, tried) else ""
        advice = f"{_advice(tried, searches)}{healing}, or ship {bundle.requested} anyway with --force"
    return GateFailed(
        f"no {bundle.requested} candidate passed the gate, and {folder} was written in {bundle.precision}: {advice}"
    )


def _better_searches(bundle: Bundle, tried: int, most: int | None, budget: float | None) -> list[str]:
    """How the same export could find a better int8 candidate: more of them, more calibration images."""
    if bundle.requested != "int8":
        return []
    found = []
    if most is not None and tried >= most:
        found.append(f"try more candidates (--rungs was {most})")
    elif budget is not None:
        found.append(f"try more candidates (--budget was {budget:g} s)")
    if bundle.calibration is not None and (images := bundle.calibration.images) < MIN_IMAGES:
        found.append(f"calibrate on more than {images} images (--data, --calibration-images)")
    return found


def healing_could_help(bundle: Bundle, tried: Sequence[Rung]) -> bool:
    """Whether int8 was refused for its accuracy, and healing its weights was not tried yet."""
    healed = any(rung.settings.get("healed") for rung in tried)
    return bundle.requested == "int8" and not healed and not _accurate(tried)


def _accurate(tried: Sequence[Rung]) -> list[Rung]:
    """Those that passed or, not judged, were not screened out."""
    return [rung for rung in tried if rung.accuracy == "PASS" or (rung.accuracy != "FAIL" and not rung.was_judged)]


def _advice(tried: Sequence[Rung], searches: Sequence[str]) -> str:
    """Why none of the candidates shipped, judged by the one that came closest, and what to do."""
    accurate = _accurate(tried)
    if any(rung.speed == "INCONCLUSIVE" and "speedup_fp32" in rung.values for rung in accurate):
        return "an accurate one could not be timed precisely enough; run it again on a quiet machine"
    if accurate:
        remedies = (*searches, "allow that with a lower --min-speedup")
        return f"the accurate ones are slower than required; {', '.join(remedies)}"
    open_ones = [rung for rung in tried if rung.accuracy == "INCONCLUSIVE" and rung.was_judged and rung.values]
    if open_ones:
        judged = (rung.values.get("probe_drop", rung.values.get("cosine_mean")) for rung in open_ones)
        images = max((value.n or 0 for value in judged if value is not None), default=0)
        probed = any("probe_drop" in rung.values for rung in open_ones)
        remedies = ("give more test images (--test, --judging-images)", *searches)
        remedies = (*remedies, "allow a larger drop with --max-drop") if probed else remedies
        return (
            f"the drop of {len(open_ones)} of them is neither proven nor refuted by {images} images; "
            f"{', '.join(remedies)}"
        )
    if probed_ones := [rung for rung in tried if "probe_drop" in rung.values]:
        return _advice_on_drops(probed_ones, searches)
    return (
        "their embeddings differ too much from the student's; "
        "give labelled test images of classes that --data has too, so that accuracy can decide"
    )


def _advice_on_drops(tried: Sequence[Rung], searches: Sequence[str]) -> str:
    """The smallest drop of candidates that all lose too much, how certain it is, and what could make it smaller."""
    closest = min(tried, key=lambda rung: rung.values["probe_drop"].value)
    drop = closest.values["probe_drop"]
    said, is_wide = f"{drop.value:.1f} points", not closest.was_judged
    if drop.low is not None and drop.high is not None:
        said += f" ({drop.low:.1f} to {drop.high:.1f})"
        is_wide |= drop.high - drop.low > abs(drop.value)
    said += f" on {drop.n or 0} {'judging' if closest.was_judged else 'screening'} images"
    remedies = list(searches)
    if is_wide:
        remedies.append("give more images for a surer figure (--data, --test, --judging-images)")
    if closest.speed == "INCONCLUSIVE" and "speedup_fp32" in closest.values:
        remedies.append("use a quiet machine, as its speed is undecided too")
    remedies.append("allow a larger drop with --max-drop")
    who = "the only one measured loses" if len(tried) == 1 else f"all {len(tried)} of them lose"
    least = "" if len(tried) == 1 else "at least "
    return f"{who} more accuracy than allowed, {least}{said}; {', '.join(remedies)}"


def _overflows(rung: Rung) -> bool:
    """Whether it failed by an overflow, for which no larger drop can be allowed."""
    counts = [rung.values[name].value for name in ("not_finite", "overflowing_layers") if name in rung.values]
    return rung.accuracy == "FAIL" and any(counts)


def _speed_verdict(speedup: Value, least: float) -> Verdict:
    low = speedup.value if speedup.low is None else speedup.low
    high = speedup.value if speedup.high is None else speedup.high
    least *= 1 - SPEED_TOLERANCE
    return "PASS" if low >= least else "FAIL" if high < least else "INCONCLUSIVE"


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value
