from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robx.distill.batches.views import Targets
from robx.distill.objectives.cross_entropy import Pairs, crop_pairs, crops_cross_entropy, rows_cross_entropy
from robx.errors import InputError


def plain(scores: Tensor, targets: Tensor, pairs: Pairs, tau: float) -> Tensor:
    """-sum p log q, a pair and a row at a time."""
    terms = []
    for q, v in pairs:
        for b in range(scores.shape[1]):
            powers = torch.exp(scores[v, b] / tau)
            terms.append(-(targets[q, b] * torch.log(powers / powers.sum())).sum())
    return torch.stack(terms).mean()


def draw(seed: int, *, crops: int = 4, batch: int = 3, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(crops, batch, width, generator=generator, dtype=torch.float64)
    targets = (2 * torch.randn(2, batch, width, generator=generator, dtype=torch.float64)).softmax(dim=-1)
    return scores.requires_grad_(), targets


def sparse(targets: Tensor, k: int) -> Targets:
    top = targets.topk(k, dim=-1)
    return Targets(probs=top.values, columns=top.indices, tail=1 - top.values.sum(dim=-1))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    crops=st.integers(2, 6),
    pairing=st.sampled_from(["same", "swapped"]),
    block=st.sampled_from([1, 13, 14, 10_000]),
)
def test_value_and_gradient_equal_the_plain_sum(seed: int, crops: int, pairing: str, block: int) -> None:
    scores, targets = draw(seed, crops=crops)
    pairs = crop_pairs(pairing, student_crops=crops)  # type: ignore[arg-type]
    loss = crops_cross_entropy(scores, Targets(targets), pairs=pairs, temperature=0.3, block=block)
    want = plain(scores, targets, pairs, 0.3)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, scores), torch.autograd.grad(3 * want, scores))


@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck(k: int | None) -> None:
    scores, targets = draw(5)
    held = Targets(targets) if k is None else sparse(targets, k)
    pairs = crop_pairs("same", student_crops=4)
    torch.autograd.gradcheck(
        lambda z: crops_cross_entropy(z, held, pairs=pairs, temperature=0.5, block=8), scores, fast_mode=False
    )


def test_all_columns_stored_are_the_dense_targets() -> None:
    scores, targets = draw(6)
    pairs = crop_pairs("swapped", student_crops=4)
    dense = crops_cross_entropy(scores, Targets(targets), pairs=pairs, temperature=0.1)
    stored = crops_cross_entropy(scores, sparse(targets, 7), pairs=pairs, temperature=0.1)
    torch.testing.assert_close(stored, dense)
    torch.testing.assert_close(torch.autograd.grad(stored, scores), torch.autograd.grad(dense, scores))


def test_sparse_targets_spread_their_tail_evenly() -> None:
    scores, targets = draw(7, width=9)
    held = sparse(targets, 4)
    spread = torch.zeros_like(targets)
    for q in range(2):
        for b in range(3):
            others = [c for c in range(9) if c not in held.columns[q, b]]  # type: ignore[index]
            spread[q, b, others] = (1 - targets[q, b].topk(4).values.sum()) / 5
            spread[q, b, held.columns[q, b]] = held.probs[q, b]  # type: ignore[index]
    pairs = crop_pairs("same", student_crops=4)
    loss = crops_cross_entropy(scores, held, pairs=pairs, temperature=0.2, block=9)
    want = plain(scores, spread, pairs, 0.2)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(want, scores))


def test_a_crop_without_a_pair_has_no_gradient() -> None:
    scores, targets = draw(8)
    (gradient,) = torch.autograd.grad(
        crops_cross_entropy(scores, Targets(targets), pairs=((0, 0), (1, 2)), temperature=1.0), scores
    )
    assert not gradient[1].any()
    assert not gradient[3].any()
    assert gradient[2].any()


def test_order_of_batch_and_of_local_crops_does_not_matter() -> None:
    scores, targets = draw(9, crops=5, batch=6)
    pairs = crop_pairs("same", student_crops=5)
    order, crops = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([0, 1, 4, 2, 3])
    loss = crops_cross_entropy(scores, Targets(targets), pairs=pairs, temperature=0.1)
    moved = crops_cross_entropy(scores[crops][:, order], Targets(targets[:, order]), pairs=pairs, temperature=0.1)
    torch.testing.assert_close(moved, loss)
    both = torch.tensor([1, 0, 2, 3, 4])
    swapped = crops_cross_entropy(scores[both], Targets(targets.flip(0)), pairs=pairs, temperature=0.1)
    torch.testing.assert_close(swapped, loss)


def test_half_precision_scores_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(10)
    scores = torch.randn(4, 5, 3000, generator=generator).bfloat16().requires_grad_()
    targets = torch.randn(2, 5, 3000, generator=generator).softmax(dim=-1)
    pairs = crop_pairs("same", student_crops=4)
    loss = crops_cross_entropy(scores, Targets(targets), pairs=pairs, temperature=0.1)
    want = plain(scores.detach().double(), targets.double(), pairs, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.dtype == torch.bfloat16


def test_rows_are_weighted() -> None:
    scores, targets = draw(11, crops=1, batch=5)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    loss = rows_cross_entropy(scores[0], targets[0], weights=weights, temperature=0.4, block=14)
    want = sum(weights[i] * plain(scores[:, i : i + 1], targets[:, i : i + 1], ((0, 0),), 0.4) for i in range(5))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(want, scores))


def test_no_rows_give_zero_and_keep_the_graph() -> None:
    scores = torch.zeros(0, 7, requires_grad=True)
    loss = rows_cross_entropy(scores, torch.zeros(0, 7), weights=torch.zeros(0), temperature=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert scores.grad is not None


def test_targets_get_no_gradient() -> None:
    scores, targets = draw(12)
    targets.requires_grad_()
    pairs = crop_pairs("same", student_crops=4)
    crops_cross_entropy(scores, Targets(targets), pairs=pairs, temperature=0.1).backward()  # type: ignore[no-untyped-call]
    assert targets.grad is None


def test_same_view_by_hand() -> None:
    assert set(crop_pairs("same", student_crops=4)) == {(0, 0), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)}


def test_swapped_by_hand() -> None:
    assert set(crop_pairs("swapped", student_crops=4)) == {(0, 1), (1, 0), (0, 2), (1, 2), (0, 3), (1, 3)}


def test_one_teacher_crop_teaches_every_student_crop() -> None:
    assert set(crop_pairs("same", student_crops=4, teacher_crops=1)) == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert set(crop_pairs("swapped", student_crops=4, teacher_crops=1)) == {(0, 1), (0, 2), (0, 3)}


@given(local=st.integers(0, 12), pairing=st.sampled_from(["same", "swapped"]))
def test_both_pairings_have_as_many_terms(local: int, pairing: str) -> None:
    pairs = crop_pairs(pairing, student_crops=2 + local)  # type: ignore[arg-type]
    assert len(pairs) == len(set(pairs)) == 2 + 2 * local
    assert {v for _, v in pairs} == set(range(2 + local))


@pytest.mark.parametrize(("pairing", "student", "teacher"), [("crossed", 4, 2), ("swapped", 1, 1)])
def test_invalid_pairings_are_refused(pairing: str, student: int, teacher: int) -> None:
    with pytest.raises(InputError, match=pairing):
        crop_pairs(pairing, student_crops=student, teacher_crops=teacher)  # type: ignore[arg-type]
