from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robx.distill.objectives.sinkhorn import sinkhorn


def plain(scores: Tensor, iterations: int) -> Tensor:
    """The matrix form of SwAV, algorithm 1: whole rows and columns, no logarithms."""
    matrix = scores.double().exp().T
    matrix = matrix / matrix.sum()
    prototypes, samples = matrix.shape
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=1, keepdim=True) / prototypes
        matrix = matrix / matrix.sum(dim=0, keepdim=True) / samples
    return (matrix * samples).T


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 20), width=st.integers(2, 12), iterations=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_equals_the_matrix_form(batch: int, width: int, iterations: int, seed: int) -> None:
    scores = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    torch.testing.assert_close(sinkhorn(scores, iterations=iterations), plain(scores, iterations))


def test_marginals_become_uniform() -> None:
    scores = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) / 0.3
    plan = sinkhorn(scores, iterations=200)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((8,), 40 / 8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 3])
def test_rows_are_probabilities_after_any_number_of_iterations(iterations: int) -> None:
    scores = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(1))
    for crop in scores:
        torch.testing.assert_close(sinkhorn(crop / 0.03, iterations=iterations).sum(dim=1), torch.ones(16))


def test_scores_that_overflow_an_exponential_are_balanced() -> None:
    scores = torch.tensor([[500.0, 0.0], [0.0, 500.0]])
    torch.testing.assert_close(sinkhorn(scores, iterations=3), torch.eye(2))


def test_order_of_the_batch_does_not_matter() -> None:
    scores = torch.randn(12, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sinkhorn(scores[order], iterations=3), sinkhorn(scores, iterations=3)[order])
