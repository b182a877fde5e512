"""From counts to verdicts: intervals, paired tests, and non-inferiority. Pure; scipy alone.

A candidate PASSES when even the pessimistic end of what the paired sample allows is within the margin, FAILS when even
the optimistic end is outside, and is INCONCLUSIVE otherwise: "no significant difference" is not a proof of equality.

n paired images   b reference right, candidate wrong   c reference wrong, candidate right   drop = (b - c) / n
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from robx.errors import InputError
from robx.records import Value, Verdict

LEVEL = 0.05  # one-sided; of every verdict on a single candidate


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a paired comparison allows to be said; `drop`, `bound` and `margin` are percentage points."""

    verdict: Verdict
    drop: Value  # reference minus candidate, with its two-sided 95 % interval
    bound: float  # one-sided upper bound of the drop at `level`: the PASS rests on it
    margin: float
    level: float  # how often a candidate at the margin may PASS by chance
    n: int
    needed: int | None  # images for 80 % power at this discordance and drop; None: the drop exceeds the margin
    p_value: float  # exact McNemar, two-sided
    reasons: tuple[str, ...]


def wilson(right: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as shares in [0, 1] (Wilson 1927)."""
    _require(n > 0 and 0 <= right <= n, f"{right} of {n} is no proportion")
    z = _z(confidence)
    centre = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    # The ends are 0 and 1 exactly there; floating point misses them by a hair.
    return (0.0 if right == 0 else max(0.0, centre - half)), (1.0 if right == n else min(1.0, centre + half))


def accuracy_value(right: np.ndarray, *, confidence: float = 0.95) -> Value:
    """The share of True in `right` (N,), in %, with Wilson's interval."""
    k, n = int(np.count_nonzero(right)), len(right)
    low, high = wilson(k, n, confidence=confidence)
    return Value(value=100 * k / n, low=100 * low, high=100 * high, n=n, unit="%")


def mean_value(samples: np.ndarray, *, unit: str = "", confidence: float = 0.95) -> Value:
    """The mean of `samples` (N,) with Student's t interval; no interval from one sample."""
    n = len(samples)
    _require(n > 0, "a mean of no samples was asked for")
    mean = float(np.mean(samples, dtype=np.float64))
    if n == 1:
        return Value(value=mean, n=1, unit=unit)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * np.std(samples, ddof=1, dtype=np.float64) / math.sqrt(n))
    return Value(value=mean, low=mean - half, high=mean + half, n=n, unit=unit)


def quantile_value(samples: np.ndarray, share: float, *, unit: str = "", confidence: float = 0.95) -> Value:
    """The `share` quantile of `samples` (N,) with the distribution-free interval of its order statistics.

    An end that the sample is too small to hold (the 1 % quantile of 50 values has no lower end) is None.
    """
    n = len(samples)
    _require(n > 0 and 0 <= share <= 1, f"the {share} quantile of {n} samples was asked for")
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    tail = (1 - confidence) / 2
    # Ranks (from 1) l and u with P(X_(l) <= q) >= 1 - tail and P(q <= X_(u)) >= 1 - tail.
    lower = int(stats.binom.ppf(tail, n, share))
    upper = int(stats.binom.ppf(1 - tail, n, share)) + 1
    return Value(
        value=float(np.quantile(ordered, share)),
        low=float(ordered[lower - 1]) if lower >= 1 else None,
        high=float(ordered[upper - 1]) if upper <= n else None,
        n=n,
        unit=unit,
    )


def discordant(right_reference: np.ndarray, right_candidate: np.ndarray) -> tuple[int, int]:
    """(b, c): how often only the reference, and only the candidate, is right."""
    reference, candidate = np.asarray(right_reference, bool), np.asarray(right_candidate, bool)
    _require(
        reference.ndim == 1 and reference.shape == candidate.shape,
        f"paired answers have shapes {reference.shape} and {candidate.shape}: give the same images in the same order",
    )
    return int(np.count_nonzero(reference & ~candidate)), int(np.count_nonzero(~reference & candidate))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar: under no difference b is Binomial(b + c, 1/2)."""
    if b + c == 0:
        return 1.0
    return float(min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5)))


def paired_interval(b: int, c: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (b - c) / n, as shares in [-1, 1] (Tango 1998): honest at b = c = 0, unlike Wald's."""
    _require(n > 0 and b >= 0 and c >= 0 and b + c <= n, f"{b} and {c} discordant of {n} are no paired counts")
    z, observed = _z(confidence), (b - c) / n

    def side(sign: float, end: float) -> float:
        """The delta between the observed difference and `end` where the score statistic is `sign` * z."""

        def gap(delta: float) -> float:
            return _tango_statistic(b, c, n, delta) - sign * z

        edge = end - math.copysign(1e-12, end)
        if observed == end or gap(observed) * gap(edge) >= 0:
            return end
        return float(optimize.brentq(gap, min(observed, edge), max(observed, edge), xtol=1e-12))

    return side(1.0, -1.0), side(-1.0, 1.0)


def drop_value(b: int, c: int, n: int, *, confidence: float = 0.95) -> Value:
    """The paired drop in percentage points with Tango's interval."""
    low, high = paired_interval(b, c, n, confidence=confidence)
    return Value(value=100 * (b - c) / n, low=100 * low, high=100 * high, n=n, unit="%")


def non_inferiority(
    right_reference: np.ndarray, right_candidate: np.ndarray, margin: float, *, level: float = LEVEL
) -> Decision:
    """Whether the candidate's accuracy is within `margin` percentage points of the reference's, on paired images.

    Args:
        right_reference: bool (N,), whether the reference is right on each image.
        right_candidate: bool (N,), the same images in the same order.
        margin: the drop that is tolerated, in percentage points; more than 0.
        level: how often a candidate whose drop is the margin may PASS; less than .05 where it is one of several.

    Raises:
        InputError: shapes that do not pair, no images, or a margin or level that makes no test.
    """
    check_margin(margin)
    _require(0 < level < 0.5, f"a level of {level} makes no test: give one between 0 and .5")
    _require(len(right_reference) > 0, "no labelled images to compare: a verdict needs some")
    (b, c), n = discordant(right_reference, right_candidate), len(right_reference)
    drop = drop_value(b, c, n)
    confidence = 1 - 2 * level  # two-sided: each end is one-sided at `level`
    optimistic, pessimistic = (100 * end for end in paired_interval(b, c, n, confidence=confidence))
    verdict: Verdict = "PASS" if pessimistic <= margin else "FAIL" if optimistic > margin else "INCONCLUSIVE"
    needed = images_needed(margin, discordance=(b + c) / n, drop=drop.value, level=level)
    return Decision(
        verdict=verdict,
        drop=drop,
        bound=pessimistic,
        margin=margin,
        level=level,
        n=n,
        needed=needed,
        p_value=mcnemar_exact(b, c),
        reasons=(_explain(verdict, drop, (optimistic, pessimistic), margin=margin, level=level, needed=needed),),
    )


def check_margin(margin: float) -> None:
    """Refuse a margin that is not between 0 and 100 percentage points."""
    _require(0 < margin < 100, f"a margin of {margin} points cannot be tested: give one between 0 and 100")


def least_images(margin: float, *, level: float = LEVEL) -> int:
    """The fewest images with which a PASS within `margin` points is possible at all: no image may differ."""
    share = margin / 100
    z = _z(1 - 2 * level)
    return math.ceil(z * z * (1 - share) / share)


def images_needed(
    margin: float, *, discordance: float, drop: float = 0.0, power: float = 0.8, level: float = LEVEL
) -> int | None:
    """Images for a PASS with `power` when the true drop is `drop` points and a share `discordance` of images differs.

    n = (z_(1 - level) + z_power)^2 (discordance - drop^2) / (margin - drop)^2, never below `least_images`. A gain
    counts as no drop. None when the drop reaches the margin: no number of images would do.
    """
    true_drop = max(0.0, drop) / 100
    if true_drop >= margin / 100:
        return None
    z = _z(1 - 2 * level) + float(stats.norm.ppf(power))
    n = z * z * (max(discordance, true_drop) - true_drop**2) / (margin / 100 - true_drop) ** 2
    return max(math.ceil(n), least_images(margin, level=level))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Holm 1979): compare each with the family's level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL if any fails, else PASS if all pass, else INCONCLUSIVE; no verdict at all proves nothing either."""
    found = set(verdicts)
    return "FAIL" if "FAIL" in found else "PASS" if found == {"PASS"} else "INCONCLUSIVE"


def _tango_statistic(b: int, c: int, n: int, delta: float) -> float:
    """(b - c - n delta) over its standard error, at the restricted maximum-likelihood estimate of c / n."""
    first, second, third = 2 * n, -b - c + (2 * n - b + c) * delta, -c * delta * (1 - delta)
    q = (math.sqrt(max(0.0, second * second - 4 * first * third)) - second) / (2 * first)
    variance = n * (2 * q + delta * (1 - delta))
    numerator = b - c - n * delta
    if variance <= 0:
        return 0.0 if abs(numerator) < 1e-9 * n else math.copysign(math.inf, numerator)
    return numerator / math.sqrt(variance)


def _explain(
    verdict: Verdict, drop: Value, ends: tuple[float, float], *, margin: float, level: float, needed: int | None
) -> str:
    seen, sure = f"drop {drop.value:.2f} points on {drop.n} images", f"one-sided {100 * (1 - level):.3g} %"
    if verdict == "PASS":
        return f"{seen}; at most {ends[1]:.2f} ({sure}), within the margin of {margin:g}"
    if verdict == "FAIL":
        return f"{seen}; at least {ends[0]:.2f} ({sure}), beyond the margin of {margin:g}"
    more = f"about {needed} images would decide" if needed else "the drop seen is beyond the margin, but not surely"
    return f"{seen}; anything from {ends[0]:.2f} to {ends[1]:.2f} fits, the margin is {margin:g}: {more}"


def _z(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 for 0.95."""
    return float(stats.norm.ppf(0.5 + confidence / 2))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
