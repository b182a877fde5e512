"""Latency statistics, against scipy's distributions and MLPerf's published minimum numbers of queries."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from robx.runtime.bench import latency


@pytest.mark.parametrize(("percentile", "queries"), [(0.50, 11), (0.90, 64), (0.95, 130), (0.99, 662)])
def test_minimum_queries_are_those_that_mlperf_publishes(percentile, queries):
    assert latency.early_stopping_bound(np.arange(1, queries), percentile) is None
    assert latency.early_stopping_bound(np.arange(1, queries + 1), percentile) == queries


@settings(max_examples=40, deadline=None)
@given(
    q=st.integers(1, 3000), percentile=st.sampled_from([0.5, 0.9, 0.97, 0.99]), confidence=st.sampled_from([0.9, 0.99])
)
def test_the_bound_drops_as_many_as_the_incomplete_beta_function_allows(q, percentile, confidence):
    # The rules' own formula: the largest t with I_p(q - t, t + 1) <= 1 - c, by scipy.
    t = np.arange(1, q)
    allowed = t[scipy.stats.beta.cdf(percentile, q - t, t + 1) <= 1 - confidence]
    samples = np.random.default_rng(q).permutation(np.arange(1, q + 1))
    bound = latency.early_stopping_bound(samples, percentile, confidence)
    if not len(allowed):
        assert bound is None
    else:
        kept = np.sort(samples)[: q - (int(allowed.max()) - 1)]
        assert bound == kept.max()


def test_the_bound_has_its_stated_coverage():
    random, held = np.random.default_rng(0), 0
    true = scipy.stats.expon.ppf(0.9)
    for _ in range(400):
        held += latency.early_stopping_bound(random.exponential(size=200), 0.9, 0.95) >= true
    assert held / 400 > 0.93


@given(n=st.integers(6, 400), confidence=st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=40, deadline=None)
def test_the_median_interval_has_its_confidence_and_is_the_narrowest(n, confidence):
    low, high = (int(x) for x in latency.median_interval(np.arange(1, n + 1), confidence))
    covered = scipy.stats.binom.cdf(high - 1, n, 0.5) - scipy.stats.binom.cdf(low - 1, n, 0.5)
    narrower = scipy.stats.binom.cdf(high - 2, n, 0.5) - scipy.stats.binom.cdf(low, n, 0.5)
    # With few samples even the extremes may fall short of the confidence.
    assert covered >= confidence - 1e-12 or (low, high) == (1, n)
    assert narrower < confidence


@pytest.mark.parametrize(("n", "ranks"), [(100, (40, 61)), (1000, (469, 532))])
def test_median_interval_at_sizes_known_from_tables(n, ranks):
    assert latency.median_interval(np.arange(1, n + 1)) == ranks


@pytest.mark.parametrize("processes", [2, 3, 5, 12])
def test_process_interval_is_students_t_over_the_medians(processes):
    medians = np.random.default_rng(processes).integers(1_000_000, 2_000_000, size=processes)
    low, high = latency.process_interval([np.full(50, m) for m in medians])
    half = scipy.stats.t.ppf(0.975, processes - 1) * scipy.stats.sem(medians)
    centre = np.median(np.repeat(medians, 50))
    pooled = latency.median_interval(np.repeat(medians, 50))
    assert low == pytest.approx(max(0, min(centre - half, pooled[0])), rel=1e-3)
    assert high == pytest.approx(max(centre + half, pooled[1]), rel=1e-3)


def test_many_processes_use_their_own_degrees_of_freedom():
    medians = np.random.default_rng(0).integers(1_000_000, 2_000_000, size=60)
    low, high = latency.process_interval([np.full(3, m) for m in medians])
    assert high - low >= 2 * scipy.stats.t.ppf(0.975, 59) * scipy.stats.sem(medians)


def test_more_noise_between_processes_widens_the_interval():
    noise = np.random.default_rng(0).integers(-1000, 1000, size=(3, 200))
    alike = latency.process_interval([1_000_000 + row for row in noise])
    apart = latency.process_interval([1_000_000 + 50_000 * i + row for i, row in enumerate(noise)])
    assert apart[1] - apart[0] > 10 * (alike[1] - alike[0])


def test_summary_in_milliseconds():
    samples = [np.arange(1, 51) * 1_000_000, np.arange(51, 101) * 1_000_000]
    values = latency.summarise(samples)
    assert values["p50"].value == pytest.approx(50.5)
    assert values["p90"].value == 90
    assert values["p90"].high == pytest.approx(latency.early_stopping_bound(np.concatenate(samples), 0.9) / 1e6)
    assert values["p90"].high > 90
    assert "p99" not in values, "100 queries are too few for a claim on p99"
    assert values["throughput"].value == pytest.approx(1000 / 50.5)
    assert (values["min"].value, values["max"].value) == (1, 100)
    assert latency.summarise(samples, images_per_query=8)["throughput"].value == pytest.approx(8000 / 50.5)


def test_p99_needs_662_queries():
    samples = np.random.default_rng(0).integers(1_000_000, 2_000_000, size=662)
    assert "p99" not in latency.summarise([samples[:661]])
    assert latency.summarise([samples])["p99"].high == samples.max() / 1e6


def test_drift_and_noise_and_spread():
    rising = np.linspace(1_000_000, 1_100_000, 100).astype(np.int64)
    assert latency.drift([np.full(100, 5), rising]) == pytest.approx(1.0905, abs=2e-3)
    assert latency.drift([rising[::-1]]) < 1
    assert latency.robust_cov([np.full(10, 7)]) == 0
    normal = np.random.default_rng(0).normal(1000, 50, size=20_000)
    assert latency.robust_cov([normal]) == pytest.approx(0.05, rel=0.05)
    assert latency.spread([np.full(9, 10), np.full(9, 12)]) == pytest.approx(1.2)


def test_burst_and_sustained():
    # 10 ms a query for 200 s, then throttled to 12 ms for another 200 s.
    heated = np.concatenate([np.full(20_000, 10_000_000), np.full(16_667, 12_000_000)])
    values = latency.sustained([heated])
    assert (values["burst"].value, values["sustained"].value) == (10, 12)
    assert values["slowdown"].value == pytest.approx(20)
    assert abs(values["burst"].n - 1000) <= 1 and abs(values["sustained"].n - 5000) <= 1
    assert values["sustained_p90"].high == 12
    slower = latency.sustained([heated, np.full(40_000, 10_000_000), heated[:100]])
    assert slower["slowdown"].value == pytest.approx(20), "of all processes the greatest; the short one is left out"
    assert latency.sustained([heated[:20_000]]) == {}, "200 s prove nothing"
    few = latency.sustained([np.full(10, 40_000_000_000)])
    assert few["burst"].n == 1 and "sustained_p90" not in few, "a query of 40 s"


def test_paired_ratio_finds_a_difference_that_drift_would_hide():
    random = np.random.default_rng(0)
    level = np.linspace(1_000_000, 3_000_000, 20)  # the machine slows threefold meanwhile
    a = [random.normal(0.9 * x, 0.02 * x, size=40) for x in level]
    b = [random.normal(x, 0.02 * x, size=40) for x in level]
    ratio = latency.paired_ratio(a, b)
    assert ratio.low < 0.9 < ratio.high < 0.93
    assert latency.paired_ratio(b, a).low > 1.05
    assert latency.paired_ratio(a, a).value == 1


def test_the_paired_ratio_of_equal_models_shows_no_difference():
    claims = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        blocks = [[random.normal(100, 10, size=20) for _ in range(15)] for _ in range(2)]
        ratio = latency.paired_ratio(*blocks, seed=seed)
        claims += ratio.high < 1 or ratio.low > 1
    assert claims <= 8


def test_the_paired_ratio_needs_pairs():
    with pytest.raises(ValueError, match="2 blocks of A and 1 of B"):
        latency.paired_ratio([np.ones(3)] * 2, [np.ones(3)])
