from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.build import OBJECTIVES
from robx.distill.objectives.cross_entropy import crop_pairs
from robx.distill.objectives.rob_dino import RobDino, dino_loss, dino_targets
from robx.distill.objectives.sinkhorn import sinkhorn
from robx.distill.recipes import preset


def views(batch: int) -> Views:
    return Views(torch.zeros(2, batch, 3, 1, 1), torch.zeros(0, batch, 3, 1, 1), torch.arange(batch))


def plain_rob_dino(teacher: Tensor, student: Tensor, pairing: str) -> Tensor:
    """Global crop g against the teacher's g (or the other one), each local crop against both; taus 0.07 and 0.1."""
    terms = []
    crops, batch = student.shape[:2]
    for v in range(crops):
        for q in range(2):
            if v < 2 and (q != v if pairing == "same" else q == v):
                continue
            for b in range(batch):
                p = torch.exp(teacher[q, b] / 0.07) / torch.exp(teacher[q, b] / 0.07).sum()
                r = torch.exp(student[v, b] / 0.1) / torch.exp(student[v, b] / 0.1).sum()
                terms.append(-(p * torch.log(r)).sum())
    return torch.stack(terms).mean()


def draw(seed: int, crops: int, batch: int = 3, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(2, batch, width, generator=generator, dtype=torch.float64)
    student = torch.rand(crops, batch, width, generator=generator, dtype=torch.float64)
    return teacher, student.requires_grad_()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), local=st.integers(0, 4), pairing=st.sampled_from(["same", "swapped"]))
def test_loss_and_gradient_equal_the_plain_form(seed: int, local: int, pairing: str) -> None:
    teacher, student = draw(seed, 2 + local)
    objective = RobDino(pairing=pairing)  # type: ignore[arg-type]
    loss, _ = objective(Scores(student), Targets(objective.target_probs(teacher)), views(3))
    want = plain_rob_dino(teacher, student, pairing)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))


def test_gradcheck() -> None:
    teacher, student = draw(1, 4)
    objective = RobDino()
    targets = Targets(objective.target_probs(teacher))
    torch.autograd.gradcheck(lambda z: objective(Scores(z), targets, views(3))[0], student)


def test_targets_are_probabilities_without_gradient() -> None:
    scores = torch.randn(2, 3, 5, requires_grad=True, dtype=torch.bfloat16)
    probs = RobDino().target_probs(scores)
    assert probs.dtype == torch.float32
    assert not probs.requires_grad
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 3))


def test_a_warm_up_temperature_replaces_the_objectives() -> None:
    scores = torch.randn(2, 3, 5)
    torch.testing.assert_close(RobDino().target_probs(scores, temperature=0.04), (scores / 0.04).softmax(dim=-1))


def test_sinkhorn_balances_each_crop_separately() -> None:
    scores = torch.randn(2, 6, 4, dtype=torch.float64)
    plan = dino_targets(scores, temperature=0.07, sinkhorn_iterations=3)
    for q in range(2):
        torch.testing.assert_close(plan[q], sinkhorn(scores[q] / 0.07, iterations=3))


def test_statistics_of_known_distributions() -> None:
    sure = torch.full((4, 8, 16), -40.0)
    sure[..., 3] = 40
    uniform = Targets(torch.full((2, 8, 16), 1 / 16))
    _, stats = RobDino()(Scores(sure), uniform, views(8))
    log16 = torch.tensor(16.0).log()
    torch.testing.assert_close(stats["target_entropy"], log16)
    torch.testing.assert_close(stats["target_use"], torch.tensor(16.0))
    torch.testing.assert_close(stats["student_entropy"], torch.tensor(0.0))
    torch.testing.assert_close(stats["student_use"], torch.tensor(1.0))
    _, stats = RobDino()(Scores(sure), Targets(RobDino().target_probs(sure[:2])), views(8))
    assert stats["agreement"] == 1
    _, stats = RobDino()(Scores(sure), Targets(RobDino().target_probs(-sure[:2])), views(8))
    assert stats["agreement"] == 0


def test_statistics_of_sparse_targets_are_those_of_their_dense_form() -> None:
    teacher, student = draw(3, 4, width=6)
    objective = RobDino()
    probs = objective.target_probs(teacher)
    top = probs.topk(6, dim=-1)
    sparse = Targets(top.values, top.indices, torch.zeros(2, 3, dtype=torch.float64))
    _, dense = objective(Scores(student), Targets(probs), views(3))
    _, stored = objective(Scores(student), sparse, views(3))
    for name, value in dense.items():
        torch.testing.assert_close(stored[name], value, msg=name)


@pytest.mark.parametrize("crops", [1, 2])
def test_one_or_two_teacher_crops(crops: int) -> None:
    teacher, student = draw(4, 4)
    objective = RobDino()
    probs = objective.target_probs(teacher[:crops])
    loss, _ = objective(Scores(student), Targets(probs), views(3))
    logs = (student / 0.1).log_softmax(dim=-1)
    pairs = crop_pairs("same", student_crops=4, teacher_crops=crops)
    want = torch.stack([-(probs[q] * logs[v]).sum(dim=-1).mean() for q, v in pairs]).mean()
    torch.testing.assert_close(loss, want)


def test_a_copied_head_learns_the_norm_that_matches_its_teacher() -> None:
    """With targets at .07 and scores at .1, the loss is at its floor for g_s = .1 / .07 g_t = 1.43 g_t."""
    torch.manual_seed(0)
    recipe = preset("dino", "vit")
    head = RobDino.native_head(8, recipe, outputs=12, patch_outputs=None, teacher=None)
    teacher = copy.deepcopy(head)
    trained = [parameter for name, parameter in head.named_parameters() if name == "last_layer.weight_g"]
    assert len(trained) == 1 and trained[0].requires_grad
    head.mlp.requires_grad_(False)
    features = torch.randn(12, 8)
    targets = Targets(dino_targets(teacher(features).detach()[None], temperature=0.07))
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(80):
        loss = dino_loss(head(features)[None], targets, pairing="same", temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(trained[0].detach(), torch.full((12, 1), 0.1 / 0.07), rtol=0.02, atol=0)
    floor = torch.special.entr(targets.probs).sum(dim=-1).mean()
    torch.testing.assert_close(loss.detach(), floor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["dino", "ibot"])
def test_the_norm_is_learned_in_rob_and_fixed_in_the_base_method(method: str) -> None:
    for base in (False, True):
        recipe = preset(method, "vit", base=base)
        head = OBJECTIVES[method].native_head(8, recipe, outputs=6, patch_outputs=6, teacher=None)
        norms = [parameter for name, parameter in head.named_parameters() if name.endswith("weight_g")]
        assert norms and all(parameter.requires_grad is not base for parameter in norms)
