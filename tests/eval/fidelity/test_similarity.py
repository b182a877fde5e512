"""Figures of two sets of embeddings against their definitions and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robx.embeddings import centred_cosine
from robx.errors import InputError
from robx.eval.fidelity import similarity
from robx.eval.fidelity.similarity import (
    linear_cka,
    neighbour_overlap,
    relative_error,
    similarity_spearman,
)


def test_plain_cosine_flatters_where_the_centred_one_tells():
    reference = np.random.default_rng(2).normal(20, 1, size=(200, 24))
    other = np.random.default_rng(3).permutation(reference)  # somebody else's embedding
    plain = np.sum(reference * other, 1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(other, axis=1)
    assert plain.mean() > 0.99
    assert abs(centred_cosine(reference, other).mean()) < 0.2


def test_centred_cosine_is_the_definition():
    reference = np.random.default_rng(1).normal(20, 2, size=(60, 8))
    candidate = reference + np.random.default_rng(4).normal(size=reference.shape)
    mean = reference.mean(0)
    expected = [
        (r - mean) @ (c - mean) / np.sqrt(((r - mean) ** 2).sum() * ((c - mean) ** 2).sum())
        for r, c in zip(reference, candidate, strict=True)
    ]
    np.testing.assert_allclose(centred_cosine(reference, candidate), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_centred_cosine_keeps_to_its_range_and_ignores_size(seed, scale):
    rng = np.random.default_rng(seed)
    reference, candidate = rng.normal(size=(2, 12, 5))
    cosine = centred_cosine(reference, candidate)
    assert (np.abs(cosine) <= 1).all()
    mean = reference.mean(0)
    np.testing.assert_allclose(centred_cosine(reference, mean + scale * (candidate - mean)), cosine, atol=1e-9)
    np.testing.assert_allclose(centred_cosine(reference, reference), 1)


def test_relative_error():
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(relative_error(reference, reference * 1.1), [0.1, 0.1])
    assert relative_error(reference, np.array([[np.nan, 0], [0, 2.0]])).tolist() == [1.0, 0.0]
    zero = np.zeros((2, 2))
    assert relative_error(zero, np.array([[0, 0], [1e-9, 0]])).tolist() == [0.0, 1.0]


def test_neighbour_overlap_counts_by_hand():
    rng = np.random.default_rng(10)
    first, second = rng.normal(size=(2, 30, 6)).astype(np.float32)

    def neighbours(features):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -2)
        return [set(row) for row in np.argsort(-similarity, 1)[:, :5].tolist()]

    expected = np.mean([len(a & b) / 5 for a, b in zip(neighbours(first), neighbours(second), strict=True)])
    assert neighbour_overlap(first, second, k=5).value == pytest.approx(100 * expected)
    twins = np.repeat(first[:10], 3, axis=0)  # duplicates may stand before an image itself
    assert neighbour_overlap(twins, twins, k=5).value == 100


def rotation(width, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


@pytest.mark.parametrize("images", [12, 400])  # fewer than the width, and more
@pytest.mark.parametrize("change", ["nothing", "rotation", "scale", "all"])
def test_cka_and_rank_correlation_are_one_where_the_geometry_is_kept(images, change):
    reference = np.random.default_rng(1).normal(2, 1, size=(images, 24))
    candidate = reference
    if change in ("rotation", "all"):
        candidate = candidate @ rotation(24, 2)
        assert centred_cosine(reference, candidate).mean() < 0.6  # which the cosine does not forgive
    if change in ("scale", "all"):
        candidate = candidate * 37.5
    assert linear_cka(reference, candidate) == pytest.approx(1, abs=1e-9)
    assert similarity_spearman(reference, candidate) == pytest.approx(1, abs=1e-4)
    assert linear_cka(reference, candidate + 100) == pytest.approx(1, abs=1e-9)  # CKA is centred


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_noise_costs_what_the_closed_forms_say(noise):
    """White X and Y = X + s Z: CKA tends to 1 / (1 + s^2), and so does the correlation r of similarities, of which
    Spearman's is 6 / pi asin(r / 2) for normal pairs."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(4000, 32))
    candidate = reference + noise * rng.normal(size=reference.shape)
    kept = 1 / (1 + noise**2)
    assert linear_cka(reference, candidate) == pytest.approx(kept, abs=0.02)
    found = similarity_spearman(reference[:600], candidate[:600])
    assert found == pytest.approx(6 / np.pi * np.arcsin(kept / 2), abs=0.02)


def test_unrelated_sets_agree_by_chance_alone():
    first, second = np.random.default_rng(4).normal(size=(2, 1000, 50))
    assert linear_cka(first, second) == pytest.approx(50 / 1050, abs=0.005)
    assert similarity_spearman(first, second) == pytest.approx(0, abs=0.02)


def test_cka_is_the_kernel_definition_whichever_products_it_takes():
    rng = np.random.default_rng(5)
    for images in (9, 60):
        reference, candidate = rng.normal(size=(images, 20)), rng.normal(size=(images, 14)) ** 3
        centre = np.eye(images) - 1 / images
        kernels = [centre @ (rows @ rows.T) @ centre for rows in (reference, candidate)]
        expected = np.trace(kernels[0] @ kernels[1]) / np.sqrt(
            np.trace(kernels[0] @ kernels[0]) * np.trace(kernels[1] @ kernels[1])
        )
        assert linear_cka(reference, candidate) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_is_scipys_over_a_loop_of_pairs():
    reference, candidate = np.random.default_rng(6).normal(size=(2, 25, 4)) + 0.4

    def similarities(rows):
        def cosine(a, b):
            return a @ b / np.sqrt((a @ a) * (b @ b))

        return [cosine(rows[i], rows[j]) for i in range(25) for j in range(i)]

    expected = stats.spearmanr(similarities(reference), similarities(candidate)).statistic
    assert similarity_spearman(reference, candidate) == pytest.approx(expected, abs=1e-4)


def test_a_constant_set_has_nothing_in_common():
    rows = np.random.default_rng(7).normal(size=(30, 5))
    assert linear_cka(rows, np.ones((30, 5))) == similarity_spearman(rows, np.ones((30, 5))) == 0


def test_the_figures_say_how_many_images_they_are_of(monkeypatch):
    reference = np.random.default_rng(8).normal(size=(300, 6)).astype(np.float32)
    candidate = reference.copy()
    candidate[:4] = np.nan
    monkeypatch.setattr(similarity, "MOST_PAIRED_IMAGES", 50)
    found = similarity.closeness(reference, candidate)
    assert found["cka"].n == 296 and found["cka"].value == pytest.approx(1)
    assert found["similarity_spearman"].n == 50 and found["similarity_spearman"].value == pytest.approx(1, abs=1e-4)
    assert found["cosine_mean"].n == 300 and found["not_finite"].value == 4
    few = similarity.closeness(reference[:6], candidate[:6])
    assert "cka" not in few and "similarity_spearman" not in few


def test_sets_that_do_not_pair_are_refused():
    rows = np.ones((4, 3))
    with pytest.raises(InputError, match="do not pair"):
        similarity.closeness(rows, rows[:3])
    with pytest.raises(InputError, match="reference's own"):
        similarity.closeness(rows * np.nan, rows)
