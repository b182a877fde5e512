from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.rob_swav import RobSwav, swav_targets

VIEWS = Views(torch.zeros(2, 4, 3, 1, 1), torch.zeros(0, 4, 3, 1, 1), torch.arange(4))


def codes(scores: Tensor, epsilon: float) -> Tensor:
    """SwAV, algorithm 1, on one crop's scores (B, K)."""
    matrix = torch.exp(scores / epsilon).T
    matrix = matrix / matrix.sum()
    for _ in range(3):
        matrix = matrix / matrix.sum(dim=1, keepdim=True) / matrix.shape[0]
        matrix = matrix / matrix.sum(dim=0, keepdim=True) / matrix.shape[1]
    return (matrix * matrix.shape[1]).T


def swav_criterion(teacher: Tensor, student: Tensor) -> Tensor:
    """For each global crop: its codes against all other crops' predictions, the mean of V - 1; the mean of both."""
    crops = len(student)
    loss = torch.zeros((), dtype=torch.float64)
    for crop in (0, 1):
        q = codes(teacher[crop], 0.03)
        inner = torch.zeros((), dtype=torch.float64)
        for v in range(crops):
            if v != crop:
                inner = inner - (q * torch.log_softmax(student[v] / 0.1, dim=1)).sum(dim=1).mean()
        loss = loss + inner / (crops - 1)
    return loss / 2


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)
    student = torch.rand(6, 4, 5, generator=generator, dtype=torch.float64)
    return teacher, student.requires_grad_()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_swapped_is_swavs_own_criterion(seed: int) -> None:
    teacher, student = draw(seed)
    objective = RobSwav(pairing="swapped")
    loss, _ = objective(Scores(student), Targets(objective.target_probs(teacher)), VIEWS)
    want = swav_criterion(teacher, student)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))


def test_same_view_by_hand() -> None:
    teacher, student = draw(1)
    objective = RobSwav()
    loss, _ = objective(Scores(student), Targets(objective.target_probs(teacher)), VIEWS)
    q = [codes(teacher[0], 0.03), codes(teacher[1], 0.03)]
    logs = torch.log_softmax(student / 0.1, dim=-1)
    terms = [-(q[0] * logs[0]), -(q[1] * logs[1])] + [-(q[g] * logs[v]) for v in range(2, 6) for g in (0, 1)]
    torch.testing.assert_close(loss, torch.stack([term.sum(dim=1).mean() for term in terms]).mean())


def test_gradcheck() -> None:
    teacher, student = draw(2)
    objective = RobSwav()
    targets = Targets(objective.target_probs(teacher))
    torch.autograd.gradcheck(lambda z: objective(Scores(z), targets, VIEWS)[0], student)


def test_no_iterations_are_a_softmax() -> None:
    teacher, _ = draw(3)
    soft = swav_targets(teacher, epsilon=0.03, sinkhorn_iterations=0)
    torch.testing.assert_close(soft, (teacher / 0.03).softmax(dim=-1))
