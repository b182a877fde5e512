from __future__ import annotations

import torch
from torch import Tensor

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.kd import SupervisedKd

VIEWS = Views(torch.zeros(2, 3, 3, 1, 1), torch.zeros(0, 3, 3, 1, 1), torch.arange(3))


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 8 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    student = 8 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    return teacher, student.requires_grad_()


def test_equals_torchs_divergence() -> None:
    teacher, student = draw(0)
    objective = SupervisedKd(temperature=10)
    loss, _ = objective(Scores(student), Targets(objective.target_probs(teacher)), VIEWS)
    logs, targets = (student / 10).log_softmax(dim=-1), (teacher / 10).softmax(dim=-1)
    want = 100 * torch.nn.functional.kl_div(logs, targets, reduction="sum") / 6
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))


def test_gradcheck() -> None:
    teacher, student = draw(1)
    objective = SupervisedKd()
    targets = Targets(objective.target_probs(teacher))
    torch.autograd.gradcheck(lambda z: objective(Scores(z), targets, VIEWS)[0], student)


def test_a_perfect_student_has_no_loss() -> None:
    teacher, _ = draw(2)
    objective = SupervisedKd()
    loss, stats = objective(Scores(teacher), Targets(objective.target_probs(teacher)), VIEWS)
    assert abs(float(loss)) < 1e-10
    assert stats["agreement"] == 1


def test_stored_targets_have_the_same_gradient() -> None:
    teacher, student = draw(3)
    objective = SupervisedKd()
    probs = objective.target_probs(teacher)
    top = probs.topk(5, dim=-1)
    dense, _ = objective(Scores(student), Targets(probs), VIEWS)
    stored, _ = objective(Scores(student), Targets(top.values, top.indices, torch.zeros(2, 3)), VIEWS)
    torch.testing.assert_close(torch.autograd.grad(stored, student), torch.autograd.grad(dense, student))
