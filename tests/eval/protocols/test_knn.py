"""Exact kNN against scikit-learn and a loop that follows DINO's formula literally."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from robx.embeddings import knn_vote
from robx.errors import InputError
from robx.eval import neighbours
from robx.eval.protocols import knn


def data(seed=0, n=300, m=60, d=16, classes=7):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    labels, wanted = rng.integers(0, classes, n), rng.integers(0, classes, m)
    bank = (centres[labels] + rng.normal(size=(n, d))).astype(np.float32)
    queries = (centres[wanted] + rng.normal(size=(m, d))).astype(np.float32)
    return bank, labels, queries, wanted


def by_hand(bank, labels, queries, k, temperature, classes):
    """One query at a time, in float64, as the paper writes it."""
    out = []
    unit = bank.astype(float) / np.linalg.norm(bank.astype(float), axis=1, keepdims=True)
    for query in queries.astype(float):
        similarity = unit @ (query / np.linalg.norm(query))
        scores = np.zeros(classes)
        for row in np.argsort(-similarity, kind="stable")[:k]:
            scores[labels[row]] += np.exp(similarity[row] / temperature)
        order = np.argsort(-scores, kind="stable")[:5]
        out.append([c if scores[c] > 0 else -1 for c in order])
    return np.array(out)


@pytest.mark.parametrize("k", [1, 10, 20, 100])
def test_weighted_knn_is_the_formula(k):
    bank, labels, queries, _ = data()
    found = knn.weighted_knn(bank, labels, queries, k=k, classes=7)
    np.testing.assert_array_equal(found, by_hand(bank, labels, queries, k, 0.07, 7))


def test_nearest_is_scikit_learns():
    bank, _, queries, _ = data(1)
    similarities, rows = neighbours.nearest(bank, queries, 15)
    distance, expected = (
        NearestNeighbors(n_neighbors=15, metric="cosine", algorithm="brute").fit(bank).kneighbors(queries)
    )
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(similarities, 1 - distance, atol=1e-5)


@pytest.mark.parametrize(("query_block", "bank_block"), [(1, 1), (7, 13), (1000, 31), (16, 1000)])
def test_blocks_of_any_size_find_the_same(monkeypatch, query_block, bank_block):
    bank, labels, queries, _ = data(2)
    whole = neighbours.nearest(bank, queries, 20)
    votes = knn_vote(whole[0], labels[whole[1]])
    monkeypatch.setattr(neighbours, "_QUERY_BLOCK", query_block)
    monkeypatch.setattr(neighbours, "_BANK_BLOCK", bank_block)
    pieces = neighbours.nearest(bank, queries, 20)
    np.testing.assert_array_equal(whole[1], pieces[1])
    np.testing.assert_allclose(whole[0], pieces[0], atol=1e-6)
    np.testing.assert_array_equal(votes, knn_vote(pieces[0], labels[pieces[1]]))


def test_the_bank_may_be_a_memory_map(tmp_path):
    bank, _, queries, _ = data(3)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    np.testing.assert_array_equal(neighbours.nearest(mapped, queries, 5)[1], neighbours.nearest(bank, queries, 5)[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-18, 1e18))
def test_scale_does_not_matter(seed, scale):
    bank, labels, queries, _ = data(seed, n=40, m=8, d=6, classes=3)
    found = knn.weighted_knn(bank * np.float32(scale), labels, queries, k=10, classes=3)
    np.testing.assert_array_equal(found, knn.weighted_knn(bank, labels, queries, k=10, classes=3))


def test_the_weight_decides_against_the_majority():
    # Two far neighbours of class 0 against one near neighbour of class 1: exp(1 / .07) outweighs 2 exp(.5 / .07).
    bank = np.array([[0.5, 0.866], [0.5, -0.866], [1, 0]], np.float32)
    query = np.array([[1, 0]], np.float32)
    labels = np.array([0, 0, 1])
    assert knn.weighted_knn(bank, labels, query, k=3)[0, 0] == 1
    assert knn.weighted_knn(bank, labels, query, k=3, temperature=10.0)[0, 0] == 0


def test_a_class_without_a_vote_is_never_predicted():
    bank, queries = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    found = knn.weighted_knn(bank, np.array([2, 2, 2]), queries, k=2, classes=9)
    assert (found[:, 0] == 2).all() and (found[:, 1:] == -1).all()


def test_values_that_are_not_finite_answer_and_attract_nothing():
    bank, labels, queries, _ = data(4)
    bank[5], queries[3] = np.nan, np.inf
    found = knn.weighted_knn(bank, labels, queries, k=20, classes=7)
    assert (found[3] == -1).all()
    assert not (neighbours.nearest(bank, np.delete(queries, 3, 0), 20)[1] == 5).any()


def test_equal_similarities_are_ordered_by_row():
    bank = np.tile(np.array([[1.0, 2.0]], np.float32), (6, 1))
    assert neighbours.nearest(bank, bank[:1], 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_accuracy_names_its_headline_and_leaves_the_unlabelled_out():
    bank, labels, queries, wanted = data(5)
    values = knn.knn_accuracy(bank, labels, queries, wanted, classes=7)
    assert set(values) == {f"{t}{s}" for t in ("top1", "top5") for s in ("", "_k10", "_k20", "_k100", "_k200")}
    assert values["top1"] == values["top1_k20"]
    expected = (by_hand(bank, labels, queries, 100, 0.07, 7)[:, 0] == wanted).mean()
    assert values["top1_k100"].value == pytest.approx(100 * expected)
    assert values["top1"].low < values["top1"].value < values["top1"].high
    more = np.concatenate([queries, queries[:9]]), np.concatenate([wanted, np.full(9, -1)])
    hidden = np.concatenate([bank, queries]), np.concatenate([labels, np.full(60, -1)])
    assert knn.knn_accuracy(*hidden, *more, classes=7) == values


def test_a_small_bank_serves_what_it_can():
    bank, labels, queries, wanted = data(6, n=15, classes=3)
    assert set(knn.knn_accuracy(bank, labels, queries, wanted, classes=3)) == {"top1", "top1_k10", "top1_k15"}


def test_what_does_not_fit_is_refused():
    bank, labels, queries, wanted = data()
    with pytest.raises(InputError, match="k = 301"):
        neighbours.nearest(bank, queries, 301)
    with pytest.raises(InputError, match="one width"):
        neighbours.nearest(bank, queries[:, :3], 5)
    with pytest.raises(InputError, match="do not fit 3 classes"):
        knn.weighted_knn(bank, labels, queries, k=5, classes=3)
    with pytest.raises(InputError, match="labelled images on both sides"):
        knn.knn_accuracy(bank, np.full(300, -1), queries, wanted, classes=7)


@pytest.mark.parametrize("order", ["rising", "falling", "random", "equal"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_order_of_the_bank_changes_nothing(monkeypatch, order, k):
    """Rising similarities enter in every block, falling ones never after the first."""
    monkeypatch.setattr(neighbours, "_BANK_BLOCK", 16)
    rng = np.random.default_rng(0)
    angles = {"rising": np.linspace(3, 0.1, 200), "falling": np.linspace(0.1, 3, 200)}
    angle = angles.get(order, np.ones(200) if order == "equal" else rng.uniform(0, 3, 200))
    bank = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    queries = np.array([[1, 0], [1, 0.05], [-1, 0.3]], np.float32)
    similarities, rows = neighbours.nearest(bank, queries, k)
    unit = queries.astype(float) / np.linalg.norm(queries.astype(float), axis=1, keepdims=True)
    exact = unit @ bank.astype(float).T
    np.testing.assert_allclose(similarities, -np.sort(-exact, axis=1)[:, :k], atol=1e-6)
    assert all(len(set(found)) == k for found in rows.tolist())
    np.testing.assert_allclose(np.take_along_axis(exact, rows, axis=1), similarities, atol=1e-6)


def test_a_bank_of_broken_rows_still_gives_k_different_rows(monkeypatch):
    monkeypatch.setattr(neighbours, "_BANK_BLOCK", 4)
    bank = np.full((12, 3), np.nan, np.float32)
    bank[[2, 9]] = 1
    similarities, rows = neighbours.nearest(bank, np.ones((2, 3), np.float32), 6)
    assert rows[:, :2].tolist() == [[2, 9]] * 2 and np.isneginf(similarities[:, 2:]).all()
    assert all(len(set(found)) == 6 for found in rows.tolist())


@pytest.mark.parametrize("k", [1, 20, 150])
@pytest.mark.parametrize("block", [16, 64, 1000])
def test_pytorchs_search_finds_what_numpys_does(monkeypatch, k, block):
    monkeypatch.setattr(neighbours, "_BANK_BLOCK", block)
    monkeypatch.setattr(neighbours, "_QUERY_BLOCK", 25)
    bank, _, queries, _ = data(7)
    bank[3] = np.nan
    similarities, rows = neighbours._ordered(
        *neighbours._in_torch(bank, neighbours.unit_rows(queries)[0], k, "cpu", None)
    )
    expected = neighbours.nearest(bank, queries, k)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_allclose(similarities, expected[0], atol=1e-6)
