"""Latency statistics: pure functions of int64 nanoseconds.

Sources: the early-stopping bound is MLPerf Inference's (inference_rules.adoc, appendix "Early Stopping Criterion"); the
interval of a median is the order-statistic one (Conover, Practical Nonparametric Statistics, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from robx.records import Value

# Throttling shows late: a figure counts as sustained if it is from the last minute of five or more.
BURST_SECONDS, SUSTAINED_SECONDS, LONG_SECONDS = 10, 60, 300
# Upper 2.5 % points of Student's t with 1, 2, ... 30 degrees of freedom.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def summarise(processes: Sequence[np.ndarray], *, images_per_query: int = 1) -> dict[str, Value]:
    """Latency figures in ms from the samples of each process, int64 ns (n_i,), in the order they were measured.

    ``p50`` has the interval over processes. ``p90`` and ``p99`` have the early-stopping bound at 99 % confidence as
    `high`, and are included only if there are enough samples for it (64 and 662).
    """
    pooled = np.concatenate(list(processes))
    low, high = process_interval(processes)
    n = len(pooled)
    values = {
        "p50": Value(value=_ms(np.median(pooled)), low=_ms(low), high=_ms(high), n=n, unit="ms"),
        "mean": Value(value=_ms(pooled.mean()), n=n, unit="ms"),
        "min": Value(value=_ms(pooled.min()), n=n, unit="ms"),
        "max": Value(value=_ms(pooled.max()), n=n, unit="ms"),
        "throughput": Value(value=images_per_query * 1e9 * n / float(pooled.sum()), n=n, unit="images/s"),
        "cov": Value(value=100 * robust_cov(processes), n=n, unit="%"),
        "drift": Value(value=100 * (drift(processes) - 1), n=n, unit="%"),
    }
    for name, percentile in (("p90", 0.90), ("p99", 0.99)):
        bound = early_stopping_bound(pooled, percentile)
        if bound is not None:
            observed = np.quantile(pooled, percentile, method="inverted_cdf")
            values[name] = Value(value=_ms(observed), high=_ms(bound), n=n, unit="ms")
    return values


def early_stopping_bound(samples: np.ndarray, percentile: float, confidence: float = 0.99) -> float | None:
    """Upper bound of the true percentile at `confidence`; None if there are too few samples.

    MLPerf: of q samples, find the largest t >= 1 with I_p(q - t, t + 1) <= 1 - c, drop the t - 1 slowest, and take the
    slowest of the rest. I_p(q - t, t + 1) is P(Binomial(q, 1 - p) <= t).
    """
    q, budget = len(samples), 1.0 - confidence
    total, t = 0.0, 0
    while t < q:
        total += math.exp(_log_binomial(q, t, 1.0 - percentile))
        if total > budget:
            break
        t += 1
    t -= 1  # the last t whose cumulative probability is within the budget
    if t < 1:
        return None
    return float(np.partition(samples, q - t)[q - t])


def median_interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Order-statistic interval of the median of independent samples; the extremes for fewer than six."""
    n = len(samples)
    cumulated, below = 0.0, 0
    while below < n // 2:
        cumulated += math.exp(_log_binomial(n, below, 0.5))
        if cumulated > (1 - confidence) / 2:
            break
        below += 1
    rank = max(below, 1)
    ordered = np.sort(samples)
    return float(ordered[rank - 1]), float(ordered[n - rank])


def process_interval(processes: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % interval of the median latency over processes.

    Queries of one process are not independent (they share memory layout and clock), so with two or more processes the
    interval is Student's t over their medians, and never narrower than the pooled order-statistic one.
    """
    pooled = np.concatenate(list(processes))
    low, high = median_interval(pooled)
    if len(processes) < 2:
        return low, high
    medians = np.array([np.median(samples) for samples in processes], dtype=np.float64)
    degrees = len(medians) - 1
    t = _T975[min(degrees, len(_T975)) - 1]
    half = t * float(medians.std(ddof=1)) / math.sqrt(len(medians))
    centre = float(np.median(pooled))
    return max(0.0, min(low, centre - half)), max(high, centre + half)


def robust_cov(processes: Sequence[np.ndarray]) -> float:
    """Noise between queries as a fraction: 1.4826 MAD / median within each process, median over processes."""
    return float(np.median([_cov(samples) for samples in processes]))


def drift(processes: Sequence[np.ndarray]) -> float:
    """The median of a process's last tenth divided by that of its first tenth; the maximum over processes."""
    ratios = []
    for samples in processes:
        tenth = max(len(samples) // 10, min(len(samples), 5))
        ratios.append(float(np.median(samples[-tenth:]) / np.median(samples[:tenth])))
    return max(ratios)


def sustained(processes: Sequence[np.ndarray]) -> dict[str, Value]:
    """Effect of heat: the first 10 s of queries against the last 60 s, in processes that ran queries for 300 s.

    ``burst`` and ``sustained`` are medians in ms, ``sustained_p90`` has the early-stopping bound as `high`, and
    ``slowdown`` is how much the sustained median exceeds the burst median, in %, the maximum over processes. Empty if
    no process ran that long.
    """
    ends = [(samples, np.cumsum(samples) / 1e9) for samples in processes]
    long = [(samples, end) for samples, end in ends if end[-1] >= LONG_SECONDS]
    if not long:
        return {}
    first = [samples[: max(1, np.searchsorted(end, BURST_SECONDS))] for samples, end in long]
    last = [samples[np.searchsorted(end, end[-1] - SUSTAINED_SECONDS) :] for samples, end in long]
    burst, late = np.concatenate(first), np.concatenate(last)
    slowdown = max(float(np.median(b) / np.median(a)) for a, b in zip(first, last, strict=True))
    values = {
        "burst": Value(value=_ms(np.median(burst)), n=len(burst), unit="ms"),
        "sustained": Value(value=_ms(np.median(late)), n=len(late), unit="ms"),
        "slowdown": Value(value=100 * (slowdown - 1), n=len(late), unit="%"),
    }
    bound = early_stopping_bound(late, 0.90)
    if bound is not None:
        observed = np.quantile(late, 0.90, method="inverted_cdf")
        values["sustained_p90"] = Value(value=_ms(observed), high=_ms(bound), n=len(late), unit="ms")
    return values


def spread(processes: Sequence[np.ndarray]) -> float:
    """The largest of the processes' medians divided by the smallest."""
    medians = [float(np.median(samples)) for samples in processes]
    return max(medians) / min(medians)


def paired_ratio(
    blocks_a: Sequence[np.ndarray], blocks_b: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> Value:
    """Latency of A divided by that of B: ratio of medians, with a 95 % bootstrap interval over pairs of blocks.

    `blocks_a[i]` and `blocks_b[i]` (int64 ns) were measured one after the other, so slow phases of the machine affect
    both. A is faster than B only if `high` is below 1. With 10 to 20 independent pairs the interval covers the true
    ratio in 92 to 95 % of cases (by simulation), with fewer than six in fewer cases.

    Raises:
        ValueError: A and B have different numbers of blocks, or none.
    """
    if len(blocks_a) != len(blocks_b) or not blocks_a:
        raise ValueError(f"{len(blocks_a)} blocks of A and {len(blocks_b)} of B: they must form pairs")
    logs = np.array([math.log(np.median(a) / np.median(b)) for a, b in zip(blocks_a, blocks_b, strict=True)])
    picks = np.random.default_rng(seed).integers(len(logs), size=(resamples, len(logs)))
    low, high = np.quantile(np.median(logs[picks], axis=1), (0.025, 0.975))
    return Value(value=math.exp(np.median(logs)), low=math.exp(low), high=math.exp(high), n=len(logs), unit="")


def _cov(samples: np.ndarray) -> float:
    median = float(np.median(samples))
    return 1.4826 * float(np.median(np.abs(samples - median))) / median


def _log_binomial(n: int, k: int, p: float) -> float:
    """Logarithm of P(Binomial(n, p) = k)."""
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return choose + k * math.log(p) + (n - k) * math.log1p(-p)


def _ms(nanoseconds: float | np.floating) -> float:
    return float(nanoseconds) / 1e6
