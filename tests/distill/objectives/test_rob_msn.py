from __future__ import annotations

from typing import Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.rob_msn import RobMsn, mean_entropy, msn_targets

VIEWS = Views(torch.zeros(2, 3, 3, 1, 1), torch.zeros(0, 3, 3, 1, 1), torch.arange(3))


def plain_msn(cosines: Tensor, student: Tensor, me_max: float, pairing: str) -> Tensor:
    """Sharpened assignments at 0.1 and T = 0.25, the student at 0.1, minus the entropy of the mean prediction."""
    terms, every = [], []
    for v in range(len(student)):
        for b in range(student.shape[1]):
            answer = torch.exp(student[v, b] / 0.1) / torch.exp(student[v, b] / 0.1).sum()
            every.append(answer)
            for q in range(2):
                if (q == v) if pairing == "swapped" else (v < 2 and q != v):
                    continue
                soft = torch.exp(cosines[q, b] / 0.1) / torch.exp(cosines[q, b] / 0.1).sum()
                sharp = soft**4 / (soft**4).sum()
                terms.append(-(sharp * torch.log(answer)).sum())
    mean = torch.stack(every).mean(dim=0)
    return torch.stack(terms).mean() + me_max * (mean * torch.log(mean)).sum()


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(2, 3, 6, generator=generator, dtype=torch.float64) - 1
    student = torch.rand(5, 3, 6, generator=generator, dtype=torch.float64)
    return cosines, student.requires_grad_()


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6), me_max=st.sampled_from([0.0, 1.0, 5.0]), pairing=st.sampled_from(["same", "swapped"])
)
def test_loss_and_gradient_equal_the_plain_form(seed: int, me_max: float, pairing: Literal["same", "swapped"]) -> None:
    cosines, student = draw(seed)
    objective = RobMsn(me_max=me_max, pairing=pairing)
    loss, _ = objective(Scores(student), Targets(objective.target_probs(cosines)), VIEWS)
    want = plain_msn(cosines, student, me_max, pairing)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))


def test_gradcheck() -> None:
    cosines, student = draw(1)
    objective = RobMsn(me_max=1.0)
    targets = Targets(objective.target_probs(cosines))
    torch.autograd.gradcheck(lambda z: objective(Scores(z), targets, VIEWS)[0], student)


def sharpen(probs: Tensor, *, temperature: float) -> Tensor:
    """p^(1/T) / sum p^(1/T) over the last axis (MSN, arXiv 2204.07141, section 3)."""
    powers = probs ** (1 / temperature)
    return powers / powers.sum(dim=-1, keepdim=True)


def test_sharpening_a_softmax_is_a_colder_softmax() -> None:
    cosines, _ = draw(2)
    sharp = sharpen((cosines / 0.1).softmax(dim=-1), temperature=0.25)
    torch.testing.assert_close(sharp, (cosines / 0.025).softmax(dim=-1))
    torch.testing.assert_close(RobMsn().target_probs(cosines), sharp)


def test_sinkhorn_starts_from_the_sharpened_probabilities() -> None:
    cosines, _ = draw(3)
    plan = msn_targets(cosines, temperature=0.025, sinkhorn_iterations=3)
    for q in range(2):
        matrix = sharpen((cosines[q] / 0.1).softmax(dim=-1), temperature=0.25).T
        for _ in range(3):
            matrix = matrix / matrix.sum(dim=1, keepdim=True) / 6
            matrix = matrix / matrix.sum(dim=0, keepdim=True) / 3
        torch.testing.assert_close(plan[q], (matrix * 3).T)


def test_mean_entropy_is_largest_for_balanced_predictions() -> None:
    balanced = 50 * torch.eye(4).expand(2, 4, 4)
    torch.testing.assert_close(mean_entropy(balanced, temperature=0.1), torch.tensor(4.0).log())
    collapsed = 50 * torch.eye(4)[[0, 0, 0, 0]].expand(2, 4, 4)
    assert mean_entropy(collapsed, temperature=0.1).abs() < 1e-5
