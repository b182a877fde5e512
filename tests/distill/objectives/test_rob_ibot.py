from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.cross_entropy import Pairing
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_ibot import RobIbot, masked_patch_loss
from robx.errors import InputError


def draw(seed: int, *, empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 3, 5, generator=generator) < 0.4
    if empty:
        masks[0, 1] = False
    return student, teacher, masks


def plain_patches(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    crops = []
    for g in range(2):
        for b in range(3):
            total = torch.zeros((), dtype=torch.float64)
            for p in range(5):
                if masks[g, b, p]:
                    target = torch.exp(teacher[g, b, p] / 0.07) / torch.exp(teacher[g, b, p] / 0.07).sum()
                    answer = torch.exp(student[g, b, p] / 0.1) / torch.exp(student[g, b, p] / 0.1).sum()
                    total = total - (target * torch.log(answer)).sum()
            crops.append(total / max(1, int(masks[g, b].sum())))
    return torch.stack(crops).mean()


def plain_cls(student: Tensor, teacher: Tensor, pairing: str) -> Tensor:
    terms = []
    for v in range(4):
        for q in range(2):
            if v < 2 and (q != v if pairing == "same" else q == v):
                continue
            for b in range(3):
                target = torch.exp(teacher[q, b] / 0.07) / torch.exp(teacher[q, b] / 0.07).sum()
                answer = torch.exp(student[v, b] / 0.1) / torch.exp(student[v, b] / 0.1).sum()
                terms.append(-(target * torch.log(answer)).sum())
    return torch.stack(terms).mean()


def views(masks: Tensor | None) -> Views:
    return Views(torch.zeros(2, 3, 3, 1, 1), torch.zeros(0, 3, 3, 1, 1), torch.arange(3), masks)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), empty=st.booleans(), chosen=st.booleans())
def test_patch_loss_and_gradient_equal_the_plain_form(seed: int, empty: bool, chosen: bool) -> None:
    student, teacher, masks = draw(seed, empty=empty)
    probs = RobIbot().patch_probs(teacher)
    rows, targets = (student[masks], probs[masks]) if chosen else (student, probs)
    loss = masked_patch_loss(rows, targets, masks, temperature=0.1)
    want = plain_patches(student, teacher, masks)
    torch.testing.assert_close(loss, want)
    if masks.any():
        torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))


def test_gradcheck_of_the_full_loss() -> None:
    patches, teacher, masks = draw(1)
    objective = RobIbot(patch_weight=0.7)
    crops = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    probs = objective.target_probs(torch.randn(2, 3, 6, dtype=torch.float64))
    targets = Targets(probs, patch_probs=objective.patch_probs(teacher))
    torch.autograd.gradcheck(lambda c, p: objective(Scores(c, p), targets, views(masks))[0], (crops, patches))


@pytest.mark.parametrize("pairing", ["same", "swapped"])
def test_the_loss_is_the_weighted_sum_of_rob_dino_and_the_patches(pairing: Pairing) -> None:
    patches, teacher, masks = draw(2)
    objective = RobIbot(patch_weight=0.5, pairing=pairing)
    generator = torch.Generator().manual_seed(3)
    crops = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    targets = Targets(objective.target_probs(target), patch_probs=objective.patch_probs(teacher))
    loss, stats = objective(Scores(crops, patches), targets, views(masks))
    cls = plain_cls(crops, target, pairing)
    # Whichever crops are paired, a masked patch is that of the same view.
    torch.testing.assert_close(loss, cls + 0.5 * plain_patches(patches, teacher, masks))
    torch.testing.assert_close(stats["cls_loss"], cls)
    torch.testing.assert_close(stats["masked"], masks.float().mean())


def test_without_patch_scores_it_is_rob_dino() -> None:
    crops, probs = torch.randn(4, 3, 6), torch.randn(2, 3, 6).softmax(dim=-1)
    loss, stats = RobIbot()(Scores(crops), Targets(probs), views(None))
    torch.testing.assert_close(loss, RobDino()(Scores(crops), Targets(probs), views(None))[0])
    assert "patch_loss" not in stats


def test_order_of_the_batch_does_not_matter() -> None:
    student, teacher, masks = draw(3)
    order = torch.tensor([2, 0, 1])
    probs = RobIbot().patch_probs(teacher)
    loss = masked_patch_loss(student, probs, masks, temperature=0.1)
    torch.testing.assert_close(
        masked_patch_loss(student[:, order], probs[:, order], masks[:, order], temperature=0.1), loss
    )


def test_patches_without_targets_are_refused() -> None:
    student, _, masks = draw(4)
    probs = torch.randn(2, 3, 6).softmax(dim=-1)
    with pytest.raises(InputError, match="patch_weight = 0"):
        RobIbot()(Scores(torch.randn(4, 3, 6), student), Targets(probs), views(masks))
