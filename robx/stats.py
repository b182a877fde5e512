"""From counts to verdicts: confidence intervals, paired tests and non-inferiority. Pure functions on SciPy.

A candidate gets PASS when even the pessimistic end of its paired confidence interval is within the margin, FAIL when
even the optimistic end is outside, and INCONCLUSIVE otherwise: "no significant difference" does not prove equality.

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

LEVEL = 0.05  # one-sided significance level of a verdict on a single candidate


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The result of a paired comparison; `drop`, `bound` and `margin` are percentage points."""

    verdict: Verdict
    drop: Value  # reference minus candidate, with its two-sided 95 % interval
    bound: float  # one-sided upper confidence bound of the drop at `level`; PASS when it is within the margin
    margin: float
    level: float  # probability that a candidate whose true drop is the margin gets PASS
    n: int
    needed: int | None  # images for 80 % power at this discordance and drop; None when the drop exceeds the margin
    p_value: float  # exact McNemar, two-sided
    reasons: tuple[str, ...]


def wilson(right: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as fractions in [0, 1] (Wilson 1927).

    Raises:
        InputError: `right` of `n` is not a proportion.
    """
    _require(n > 0 and 0 <= right <= n, f"{right} of {n} is not a proportion")
    found = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def accuracy_value(right: np.ndarray, *, confidence: float = 0.95) -> Value:
    """The percentage of True in `right` (N,), with Wilson's interval."""
    k, n = int(np.count_nonzero(right)), len(right)
    low, high = wilson(k, n, confidence=confidence)
    return Value(value=100 * k / n, low=100 * low, high=100 * high, n=n, unit="%")


def mean_value(samples: np.ndarray, *, unit: str = "", confidence: float = 0.95) -> Value:
    """The mean of `samples` (N,) with Student's t interval; a single sample has no interval."""
    n = len(samples)
    _require(n > 0, "cannot take the mean of no samples")
    mean = float(np.mean(samples, dtype=np.float64))
    if n == 1:
        return Value(value=mean, n=1, unit=unit)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * np.std(samples, ddof=1, dtype=np.float64) / math.sqrt(n))
    return Value(value=mean, low=mean - half, high=mean + half, n=n, unit=unit)


def quantile_value(samples: np.ndarray, share: float, *, unit: str = "", confidence: float = 0.95) -> Value:
    """The `share` quantile of `samples` (N,) with the distribution-free interval from its order statistics.

    An end is None when the sample is too small for it (the 1 % quantile of 50 values has no lower end).
    """
    n = len(samples)
    _require(n > 0 and 0 <= share <= 1, f"cannot take the {share} quantile of {n} samples")
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
    """(b, c): the number of images on which only the reference, and only the candidate, is right."""
    reference, candidate = np.asarray(right_reference, bool), np.asarray(right_candidate, bool)
    _require(
        reference.ndim == 1 and reference.shape == candidate.shape,
        f"paired results have shapes {reference.shape} and {candidate.shape}: give the same images in the same order",
    )
    return int(np.count_nonzero(reference & ~candidate)), int(np.count_nonzero(~reference & candidate))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value of the exact McNemar test: without a difference, b is Binomial(b + c, 1/2)."""
    return float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def paired_interval(b: int, c: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (b - c) / n, in [-1, 1] (Tango 1998); unlike Wald's it has a width at b = c = 0."""
    _require(n > 0 and b >= 0 and c >= 0 and b + c <= n, f"{b} and {c} discordant pairs of {n} are not paired counts")
    z, observed = _z(confidence), (b - c) / n

    def side(sign: float, end: float) -> float:
        """The delta between the observed difference and `end` at which the score statistic is `sign` * z."""

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
        margin: largest acceptable drop, in percentage points; more than 0.
        level: probability that a candidate whose true drop is the margin gets PASS; below .05 for one of several.

    Raises:
        InputError: the shapes do not match, there are no images, or the margin or level is out of range.
    """
    check_margin(margin)
    _require(0 < level < 0.5, f"the significance level must be between 0 and 0.5, got {level}")
    _require(len(right_reference) > 0, "no labelled images to compare: a verdict needs at least one")
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
    """Raise InputError unless the margin is between 0 and 100 percentage points."""
    _require(0 < margin < 100, f"the margin must be between 0 and 100 percentage points, got {margin}")


def least_images(margin: float, *, level: float = LEVEL) -> int:
    """The fewest images that allow a PASS within `margin` points, reached when no image differs."""
    share = margin / 100
    z = _z(1 - 2 * level)
    return math.ceil(z * z * (1 - share) / share)


def images_needed(
    margin: float, *, discordance: float, drop: float = 0.0, power: float = 0.8, level: float = LEVEL
) -> int | None:
    """Images needed for a PASS with `power` when the true drop is `drop` points and a fraction `discordance` differs.

    n = (z_(1 - level) + z_power)^2 (discordance - drop^2) / (margin - drop)^2, and at least `least_images`. A gain
    counts as a drop of 0. None when the drop reaches the margin: no number of images is enough.
    """
    true_drop = max(0.0, drop) / 100
    if true_drop >= margin / 100:
        return None
    z = _z(1 - 2 * level) + float(stats.norm.ppf(power))
    n = z * z * (max(discordance, true_drop) - true_drop**2) / (margin / 100 - true_drop) ** 2
    return max(math.ceil(n), least_images(margin, level=level))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order (Holm 1979); compare each with the level of the whole family."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL if any is FAIL, else PASS if all are, else INCONCLUSIVE; no verdicts at all are INCONCLUSIVE too."""
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
    seen = f"drop {drop.value:.2f} points on {drop.n} images"
    sure = f"one-sided {100 * (1 - level):.3g} % confidence"
    if verdict == "PASS":
        return f"{seen}; at most {ends[1]:.2f} ({sure}), within the margin of {margin:g}"
    if verdict == "FAIL":
        return f"{seen}; at least {ends[0]:.2f} ({sure}), beyond the margin of {margin:g}"
    more = f"about {needed} images would decide" if needed else "the observed drop is beyond the margin, but not surely"
    return f"{seen}; the interval is {ends[0]:.2f} to {ends[1]:.2f} and the margin {margin:g}: {more}"


def _z(confidence: float) -> float:
    """The two-sided quantile of the normal distribution: 1.96 for 0.95."""
    return float(stats.norm.ppf(0.5 + confidence / 2))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
