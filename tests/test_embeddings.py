"""Constant embeddings are distinguished from small differences between real ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robx.embeddings import is_constant, knn_vote, refuse_constant
from robx.errors import ArtifactError


@given(seed=st.integers(0, 999), size=st.floats(1e-30, 1e30), images=st.integers(2, 9))
def test_equal_embeddings_are_constant_at_any_scale_and_different_ones_are_not(
    seed: int, size: float, images: int
) -> None:
    rng = np.random.default_rng(seed)
    row = (rng.normal(size=7) * size).astype(np.float32)
    assert is_constant(np.tile(row, (images, 1)))
    assert is_constant(np.tile(row, (images, 1)) * (1 + 1e-7 * rng.normal(size=(images, 7))))
    other = np.tile(row, (images, 1)).astype(np.float64)
    other[0, 0] += 0.01 * np.linalg.norm(row.astype(np.float64))
    assert not is_constant(other)


def test_zeros_are_constant_and_one_image_says_nothing() -> None:
    assert is_constant(np.zeros((3, 4), np.float32)) and not is_constant(np.ones((1, 4), np.float32))
    with pytest.raises(ArtifactError, match="runs/x has collapsed: its embedding is the same for all 3 images"):
        refuse_constant(np.zeros((3, 4), np.float32), "runs/x")
    refuse_constant(np.eye(4, dtype=np.float32), "runs/x")


def test_a_vote_costs_memory_for_the_classes_that_occur_alone() -> None:
    similarities = np.array([[0.9, 0.5, 0.5], [0.9, 0.4, 0.3]], np.float32)
    labels = np.array([[7, 9_999_999_999, 9_999_999_999], [3, 3, 7]])
    assert knn_vote(similarities, labels, temperature=10.0).tolist() == [
        [9_999_999_999, 7, -1, -1, -1],
        [3, 7, -1, -1, -1],
    ]
