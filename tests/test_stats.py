"""Intervals and tests against closed forms, enumeration and independent optimisation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from robx import stats
from robx.errors import InputError


def paired(b, c, both, neither):
    """Bool arrays with these counts."""
    reference = np.repeat([True, False, True, False], [b, c, both, neither])
    candidate = np.repeat([False, True, True, False], [b, c, both, neither])
    return reference, candidate


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, Wilson's score interval without correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_table(right, n, low, high):
    assert stats.wilson(right, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_where_the_score_test_rejects(counts):
    right, n = counts
    share = right / n
    for end in stats.wilson(right, n):
        if 0 < end < 1:
            assert abs(share - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (6, 0), (8, 3), (3, 8), (20, 20), (40, 17)])
def test_mcnemar_is_the_binomial_enumerated(b, c):
    n = b + c
    weights = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = min(1.0, 2 * sum(weights[: min(b, c) + 1]))
    assert stats.mcnemar_exact(b, c) == pytest.approx(expected)


def test_fewer_than_six_discordants_can_never_be_significant():
    assert stats.mcnemar_exact(5, 0) > 0.05 > stats.mcnemar_exact(6, 0)


@pytest.mark.parametrize(("b", "c", "n"), [(10, 5, 100), (3, 0, 50), (40, 12, 900), (1, 7, 60)])
def test_tango_matches_a_numerical_restricted_likelihood(b, c, n):
    def statistic(delta):
        # The likelihood over the share q of c, given that the share of b is q + delta; maximised numerically.
        def loss(q):
            rest = max(1 - 2 * q - delta, 1e-300)
            return -(b * math.log(q + delta) + c * math.log(max(q, 1e-300)) + (n - b - c) * math.log(rest))

        low, high = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
        q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (b - c - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))

    low, high = stats.paired_interval(b, c, n)
    assert low < (b - c) / n < high
    assert statistic(low) == pytest.approx(1.96, abs=2e-3)
    assert statistic(high) == pytest.approx(-1.96, abs=2e-3)


def test_tango_without_discordants_is_the_closed_form():
    z2 = 1.959963984540054**2
    assert stats.paired_interval(0, 0, 900) == pytest.approx((-z2 / (900 + z2), z2 / (900 + z2)), abs=1e-9)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_tango_is_antisymmetric_and_holds_the_estimate(counts):
    b, c, n = counts
    c = min(c, n - b)
    low, high = stats.paired_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    swapped = stats.paired_interval(c, b, n)
    assert swapped == pytest.approx((-high, -low), abs=1e-6)


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.multinomial(400, [0.03, 0.02, 0.95], size=600)
    hits = [low <= 0.01 <= high for low, high in (stats.paired_interval(b, c, 400) for b, c, _ in draws)]
    assert 0.92 < np.mean(hits) < 0.98


def test_verdicts():
    same = stats.non_inferiority(*paired(0, 0, 800, 200), margin=1.0)
    assert (same.verdict, same.drop.value, same.p_value) == ("PASS", 0.0, 1.0)
    bad = stats.non_inferiority(*paired(120, 10, 700, 170), margin=1.0)
    assert bad.verdict == "FAIL" and bad.drop.value == pytest.approx(11.0) and bad.needed is None
    close = stats.non_inferiority(*paired(8, 4, 700, 188), margin=1.0)
    assert close.verdict == "INCONCLUSIVE" and close.needed > 900
    assert "900 images" in close.reasons[0] and str(close.needed) in close.reasons[0]


def test_no_significant_difference_is_not_a_pass():
    decision = stats.non_inferiority(*paired(5, 1, 60, 34), margin=1.0)
    assert decision.p_value > 0.05 and decision.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_the_least_number_of_images_is_exactly_where_a_pass_becomes_possible(margin):
    n = stats.least_images(margin)
    assert stats.non_inferiority(*paired(0, 0, n, 0), margin=margin).verdict == "PASS"
    assert stats.non_inferiority(*paired(0, 0, n - 1, 0), margin=margin).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("level", [0.025, 0.05, 0.2])
def test_a_candidate_at_the_margin_passes_as_often_as_the_level_says(level):
    rng = np.random.default_rng(2)
    draws = rng.multinomial(2000, [0.05, 0.03, 0.92], size=1500)
    passed = [
        stats.non_inferiority(*paired(b, c, same, 0), margin=2.0, level=level).verdict == "PASS" for b, c, same in draws
    ]
    assert np.mean(passed) == pytest.approx(level, abs=4 * np.sqrt(level / 1500))


def test_a_stricter_level_needs_more_images_and_says_its_name():
    answers = paired(12, 8, 1480, 0)
    usual, strict = (stats.non_inferiority(*answers, margin=1.0, level=level) for level in (0.05, 0.004))
    assert (usual.verdict, strict.verdict) == ("PASS", "INCONCLUSIVE")
    assert strict.bound > usual.bound and strict.needed > usual.needed
    assert "one-sided 95 %" in usual.reasons[0]
    assert "one-sided 99.2 %" in stats.non_inferiority(*paired(1, 1, 3000, 0), 1.0, level=0.008).reasons[0]
    assert stats.least_images(1.0, level=0.01) > stats.least_images(1.0)
    with pytest.raises(InputError, match="level"):
        stats.non_inferiority(*answers, margin=1.0, level=0.5)


def test_images_needed_gives_the_power_it_promises():
    n = stats.images_needed(2.0, discordance=0.05, drop=0.5)
    rng = np.random.default_rng(1)
    draws = rng.multinomial(n, [0.0275, 0.0225, 0.95], size=500)
    passed = [stats.paired_interval(b, c, n, confidence=0.9)[1] <= 0.02 for b, c, _ in draws]
    assert 0.74 < np.mean(passed) < 0.87


def test_images_needed_grows_without_bound_towards_the_margin():
    assert stats.images_needed(1.0, discordance=0.02, drop=0.2) < stats.images_needed(1.0, discordance=0.02, drop=0.8)
    assert stats.images_needed(1.0, discordance=0.02, drop=1.0) is None
    assert stats.images_needed(1.0, discordance=0.0) == stats.least_images(1.0)


def test_holm_is_the_published_example():
    # Step-down by hand: sorted .005 .01 .03 .04 times 4 3 2 1, then the running maximum.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_beats_bonferroni(p_values):
    adjusted = stats.holm(p_values)
    for i, p in enumerate(p_values):
        assert p <= adjusted[i] <= min(1.0, len(p_values) * p) + 1e-12
        assert all(adjusted[i] <= adjusted[j] for j, q in enumerate(p_values) if p < q)


def test_mean_value_is_the_t_interval():
    samples = np.random.default_rng(0).normal(3, 2, 40)
    value = stats.mean_value(samples)
    expected = scipy_stats.t.interval(0.95, 39, loc=samples.mean(), scale=scipy_stats.sem(samples))
    assert (value.low, value.high) == pytest.approx(expected)
    assert stats.mean_value(np.ones(1)).low is None


@settings(max_examples=30)
@given(st.integers(20, 400), st.sampled_from([0.01, 0.05, 0.5, 0.9]))
def test_quantile_interval_has_the_coverage_of_its_ranks(n, share):
    value = stats.quantile_value(np.arange(1, n + 1, dtype=float), share)
    # The samples are their own ranks. P(fewer than l below the quantile) and P(u or more below) are the two tails.
    if value.low is not None:
        assert scipy_stats.binom.cdf(value.low - 1, n, share) <= 0.025
        assert value.low <= value.value
    if value.high is not None:
        assert scipy_stats.binom.sf(value.high - 1, n, share) <= 0.025
        assert value.value <= value.high
    else:
        assert scipy_stats.binom.sf(n - 1, n, share) > 0.025


def test_worst():
    assert stats.worst(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert stats.worst(["PASS", "FAIL", "INCONCLUSIVE"]) == "FAIL"
    assert stats.worst([]) == "INCONCLUSIVE"


@pytest.mark.parametrize("margin", [0, -1, 100])
def test_a_margin_that_cannot_be_tested_is_refused(margin):
    with pytest.raises(InputError, match="margin"):
        stats.non_inferiority(np.ones(5, bool), np.ones(5, bool), margin)


def test_results_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match="same images"):
        stats.discordant(np.ones(5, bool), np.ones(4, bool))
    with pytest.raises(InputError, match="no labelled images"):
        stats.non_inferiority(np.ones(0, bool), np.ones(0, bool), 1.0)
