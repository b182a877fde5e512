from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robx.distill.batches.masks import block_masks
from robx.distill.batches.views import Scores, Views
from robx.distill.objectives.build import build_objective
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_ibot import RobIbot
from robx.distill.recipes import Recipe, override, preset
from robx.distill.students.student import StudentNet, build_student
from robx.distill.targets.branches import EmaBranch, OwnBranch, TeacherBranch
from robx.distill.targets.build import build_branch
from robx.distill.targets.centering import TargetProcessor
from robx.distill.teachers.frozen_heads import PrototypeHead
from robx.distill.teachers.teacher import Teacher
from robx.distill.training.learner import Learner
from robx.distill.training.processes import Processes
from robx.records import Preprocessing, TeacherInfo
from robx.trunk import build_trunk

VIT, CNN = "test_vit", "test_resnet"


def views(batch: int = 4, *, seed: int = 0, masked: bool = False) -> Views:
    generator = torch.Generator().manual_seed(seed)
    masks = None
    if masked:
        each = [block_masks((4, 4), [(0.4, 0.0)], seed=seed, epoch=0, index=i) for i in range(batch)]
        masks = torch.from_numpy(np.stack(each, axis=1))
    return Views(
        torch.randn(2, batch, 3, 64, 64, generator=generator),
        torch.randn(1, batch, 3, 32, 32, generator=generator),
        torch.arange(batch),
        masks,
    )


def base(method: str, **values: object) -> Recipe:
    sizes = {"crop_size": 64, "local_crop_size": 32, "local_crops": 1, "prototypes": 16}
    return override(preset(method, "vit", base=True), sizes | values)  # type: ignore[arg-type]


def frozen() -> Teacher:
    """An iBOT teacher with BatchNorm in its head, 6 prototypes for crops and 5 for patches."""
    head = PrototypeHead(nn.BatchNorm1d(64), torch.randn(6, 64), patch_prototypes=torch.randn(5, 64))
    return Teacher(
        build_trunk(VIT),
        head,
        name="small",
        method="ibot",
        info=TeacherInfo(name="small", sha256="", licence="none"),
        preprocessing=Preprocessing(size=64, crop=64),
        width=64,
        num_prototypes=6,
    )


def test_teacher_branch_asks_the_frozen_teacher_crop_by_crop() -> None:
    teacher, objective = frozen(), RobDino()
    held = views()
    targets = TeacherBranch(teacher.train(), objective).targets(held)
    for q in range(2):
        alone = teacher(held.globals[q]).crops  # BatchNorm in eval: a crop's scores are its own
        torch.testing.assert_close(targets.probs[q], (alone / 0.07).softmax(dim=-1))
    assert not targets.probs.requires_grad
    assert targets.patch_probs is None
    assert TeacherBranch(teacher, objective, crops=1).targets(held).probs.shape == (1, 4, 6)


def test_teacher_branch_gives_targets_of_the_masked_patches() -> None:
    teacher, objective = frozen(), RobIbot()
    held = views(masked=True)
    assert held.masks is not None
    targets = TeacherBranch(teacher, objective).targets(held)
    whole = torch.stack([teacher(crop).patches for crop in held.globals])  # the teacher sees no mask
    assert targets.patch_probs is not None
    torch.testing.assert_close(targets.patch_probs, (whole[held.masks] / 0.07).softmax(dim=-1))
    centred = TeacherBranch(
        teacher, objective, processor=TargetProcessor(objective, centering=True, center_momentum=0.5)
    )
    centred.targets(held)
    torch.testing.assert_close(centred.processor.patch_center, 0.5 * whole.mean(dim=(0, 1, 2)))


def test_teacher_branch_keeps_no_teacher_in_its_state() -> None:
    branch = TeacherBranch(frozen(), RobDino(), processor=TargetProcessor(RobDino(), centering=True))
    branch.targets(views())
    branch.update(4, nn.Identity())
    state = branch.state_dict()
    assert set(state) == {"processor"}
    other = TeacherBranch(frozen(), RobDino(), processor=TargetProcessor(RobDino(), centering=True))
    other.load_state_dict(state)
    assert other.processor.step == 5
    assert torch.equal(other.processor.center, branch.processor.center)  # type: ignore[arg-type]


def test_ema_by_hand() -> None:
    recipe = base("dino", drop_path=0.0)
    student = build_student(VIT, recipe, None)
    branch = EmaBranch(student, build_objective(recipe), steps=10, momentum=(0.9, 1.0))
    names = [name for name, _ in student.named_parameters()]
    hand = {name: value.detach().double().clone() for name, value in student.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        momentum = 1 - 0.1 * (np.cos(np.pi * step / 10) + 1) / 2
        for name, value in student.named_parameters():
            hand[name] = momentum * hand[name] + (1 - momentum) * value.detach().double()
        branch.update(step, student)
    mine = dict(branch.network.named_parameters())
    for name in names:
        torch.testing.assert_close(mine[name].double(), hand[name], rtol=1e-4, atol=1e-5, msg=name)
    assert branch.momentum_at(0) == pytest.approx(0.9)
    assert branch.momentum_at(10) == pytest.approx(1.0)


def test_ema_targets_come_from_the_unmasked_averaged_network() -> None:
    recipe = base("ibot", drop_path=0.5, centering=False, teacher_temperature_start=None)
    student = build_student(VIT, recipe, None)
    objective = build_objective(recipe)
    branch = EmaBranch(student, objective, steps=10)
    held = views(masked=True)
    assert held.masks is not None
    targets = branch.targets(held)
    again = branch.targets(held)
    assert torch.equal(targets.probs, again.probs)  # no drop path
    reference = copy.deepcopy(student).eval()
    features, tokens = reference.embed_globals(held.globals)
    torch.testing.assert_close(targets.probs, (reference.head(features).view(2, 4, -1) / 0.07).softmax(dim=-1))
    assert tokens is not None and targets.patch_probs is not None
    patches = reference.head.patches(tokens).view(2, 4, 16, -1)[held.masks]  # type: ignore[operator]
    torch.testing.assert_close(targets.patch_probs, (patches / 0.07).softmax(dim=-1))
    assert not targets.probs.requires_grad
    assert any(getattr(m, "drop_prob", 0) for m in student.modules())  # the student keeps its own


def test_ema_of_ibot_centres_patches_by_all_of_them() -> None:
    recipe = base("ibot", drop_path=0.0)
    student = build_student(VIT, recipe, None)
    objective = build_objective(recipe)
    branch = EmaBranch(
        student, objective, steps=10, processor=TargetProcessor(objective, centering=True, center_momentum=0.9)
    )
    held = views(masked=True)
    branch.targets(held)
    _, tokens = copy.deepcopy(student).eval().embed_globals(held.globals)
    want = 0.1 * student.head.patches(tokens).mean(dim=(0, 1))  # type: ignore[operator]
    torch.testing.assert_close(branch.processor.patch_center, want.detach(), rtol=1e-3, atol=1e-6)


def test_swavs_step_equals_its_releases() -> None:
    """One forward over all crops; codes of its global scores, without a gradient, by algorithm 1 as it is written."""
    torch.manual_seed(0)
    recipe = base("swav", queue=0)
    student, objective = build_student(CNN, recipe, None), build_objective(base("swav"))
    plain = copy.deepcopy(student)
    branch = build_branch(recipe, objective, student=student, teacher=None, steps=10, steps_per_epoch=5)
    learner = Learner(
        CNN, student, recipe=recipe, objective=objective, processes=Processes(0, 1, torch.device("cpu")), branch=branch
    )  # type: ignore[arg-type]
    held = views()
    loss, _ = learner.learn(held, learner.own_targets(held), draw=0)

    trunk, head = plain.trunk, plain.head
    features = torch.cat([trunk(held.globals.flatten(0, 1)), trunk(held.locals.flatten(0, 1))])
    z = head.projection_head(features)  # type: ignore[operator, union-attr]
    z = z / z.norm(dim=1, keepdim=True)
    c = head.prototypes.weight / head.prototypes.weight.norm(dim=1, keepdim=True)  # type: ignore[union-attr, operator]
    scores = (z @ c.T).view(3, 4, 16)
    want = torch.zeros(())
    for crop in (0, 1):
        q = torch.exp(scores[crop].detach().double() / 0.05).T
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(dim=1, keepdim=True) / 16
            q = q / q.sum(dim=0, keepdim=True) / 4
        codes = (q * 4).T.float()
        others = [v for v in range(3) if v != crop]
        logs = [torch.log_softmax(scores[v] / 0.1, dim=1) for v in others]
        want = want - sum((codes * log).sum(dim=1).mean() for log in logs) / len(others) / 2
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    for (name, mine), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
    for mine, theirs in zip(student.buffers(), plain.buffers(), strict=True):  # no second forward moved BatchNorm
        torch.testing.assert_close(mine, theirs)


def test_swav_with_an_average_has_a_second_network() -> None:
    recipe = base("swav", ema_momentum=[0.9, 1.0])
    student = build_student(CNN, recipe, None)
    branch = build_branch(recipe, build_objective(recipe), student=student, teacher=None, steps=10, steps_per_epoch=5)
    assert isinstance(branch, EmaBranch)


@pytest.mark.parametrize("crops", [1, 2])
def test_a_teacher_sees_as_many_global_crops_as_the_recipe_says(crops: int) -> None:
    recipe = override(preset("swav", "cnn"), {"teacher_crops": crops})
    branch = build_branch(
        recipe, build_objective(recipe), student=nn.Identity(), teacher=frozen(), steps=10, steps_per_epoch=5
    )
    assert isinstance(branch, TeacherBranch)
    seen = []
    branch.teacher.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    held = views()
    targets = branch.targets(held)
    assert seen == [(4 * crops, 3, 64, 64)] and targets.probs.shape == (crops, 4, 6)
    scores = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    loss, _ = build_objective(recipe)(Scores(scores), targets, held)
    logs = torch.log_softmax(scores / 0.1, dim=-1)
    pairs = [(0, 0), (0, 1), (0, 2)] if crops == 1 else [(0, 0), (1, 1), (0, 2), (1, 2)]
    terms = [-(targets.probs[q] * logs[v]).sum(dim=-1).mean() for q, v in pairs]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_msn_shares_the_students_prototypes_and_averages_the_rest() -> None:
    recipe = base("msn")
    student = build_student(VIT, recipe, None)
    branch = build_branch(recipe, build_objective(recipe), student=student, teacher=None, steps=10, steps_per_epoch=5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    branch.update(0, student)
    assert isinstance(branch, EmaBranch)
    assert torch.equal(branch.network.head.prototypes, student.head.prototypes)  # type: ignore[arg-type]
    assert not torch.equal(branch.network.trunk.cls_token, student.trunk.cls_token)  # type: ignore[arg-type]


def test_ema_batch_norm_uses_each_batchs_statistics() -> None:
    recipe = base("dino", centering=False, teacher_temperature_start=None)
    student = build_student(CNN, recipe, None)
    branch = EmaBranch(student, build_objective(recipe), steps=10)
    held = views()
    moved = Views(held.globals.clone(), held.locals, held.index)
    moved.globals[:, 0] *= 5
    one, other = branch.targets(held).probs, branch.targets(moved).probs
    assert (one[:, 1] - other[:, 1]).abs().max() > 1e-7  # another sample changed


@pytest.mark.parametrize("method", ["dino", "ibot", "msn", "swav"])
@pytest.mark.parametrize("name", [VIT, CNN])
def test_base_methods_learn_a_batch(method: str, name: str) -> None:
    """A few steps on one batch lower the loss of every base method's whole step."""
    torch.manual_seed(0)
    recipe = base(method, drop_path=0.0, patch_drop=0.0, me_max=0.0)
    student = build_student(name, recipe, None)
    objective = build_objective(recipe)
    branch = build_branch(recipe, objective, student=student, teacher=None, steps=100, steps_per_epoch=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    held = views(masked=student.mask_grid(64) is not None)
    targets = None if isinstance(branch, OwnBranch) else branch.targets(held)
    losses = []
    for step in range(6):
        scores = student(held)
        loss, stats = objective(scores, branch.read(scores) if targets is None else targets, held)
        assert all(value.ndim == 0 and torch.isfinite(value) for value in stats.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        branch.update(step, student)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_resumed_branch_continues_identically() -> None:
    recipe = base("dino")

    def fresh() -> tuple[StudentNet, Any]:
        torch.manual_seed(0)
        student = build_student(CNN, recipe, None)
        objective = build_objective(recipe)
        return student, build_branch(recipe, objective, student=student, teacher=None, steps=20, steps_per_epoch=5)

    def go(student: StudentNet, branch: Any, steps: range) -> list[Tensor]:
        seen = []
        for step in steps:
            seen.append(branch.targets(views(seed=step)).probs)
            with torch.no_grad():
                for i, parameter in enumerate(student.parameters()):
                    parameter.add_(0.01 * np.sin(step + i))
            branch.update(step, student)
        return seen

    student, branch = fresh()
    go(student, branch, range(3))
    state, weights = copy.deepcopy(branch.state_dict()), copy.deepcopy(student.state_dict())
    want = go(student, branch, range(3, 6))
    torch.manual_seed(99)
    student, branch = fresh()
    student.load_state_dict(weights)
    branch.load_state_dict(state)
    for a, b in zip(want, go(student, branch, range(3, 6)), strict=True):
        assert torch.equal(a, b)


def test_msns_momentum_is_linear() -> None:
    recipe = base("msn")
    student = build_student(VIT, recipe, None)
    branch = build_branch(recipe, build_objective(recipe), student=student, teacher=None, steps=40, steps_per_epoch=5)
    assert isinstance(branch, EmaBranch)
    first, last = recipe.ema_momentum
    for step in range(41):
        assert branch.momentum_at(step) == pytest.approx(first + step * (last - first) / 40, rel=1e-12)


@pytest.mark.parametrize("momentum", [(0.0, 0.0), (0.9, 1.0)], ids=["one network", "moving average"])
def test_swavs_queue_keeps_embeddings_and_scores_them_with_todays_prototypes(momentum: tuple[float, float]) -> None:
    """SwAV's release, written a second time: z of earlier batches times the current C, joined to the batch's scores."""
    torch.manual_seed(0)
    recipe = base("swav", queue=8, ema_momentum=momentum)
    student, objective = build_student(CNN, recipe, None), build_objective(recipe)
    branch = build_branch(recipe, objective, student=student, teacher=None, steps=10, steps_per_epoch=5)
    network = student if isinstance(branch, OwnBranch) else branch.network  # type: ignore[union-attr]
    queue: list[Tensor] = []  # (2, B, E), newest first
    for step in range(5):
        held = views(seed=step)
        plain = copy.deepcopy(network)
        targets = branch.read(student(held)) if isinstance(branch, OwnBranch) else branch.targets(held)

        crops = held.globals if isinstance(branch, EmaBranch) else torch.cat([held.globals])
        features = plain.trunk(crops.flatten(0, 1))
        if isinstance(branch, OwnBranch):  # its BatchNorm saw the local crops too
            features = torch.cat([features, plain.trunk(held.locals.flatten(0, 1))])
        z = plain.head.projection_head(features)  # type: ignore[operator, union-attr]
        z = (z / z.norm(dim=1, keepdim=True))[:8].view(2, 4, -1).detach()
        c = plain.head.prototypes.weight.detach()  # type: ignore[union-attr, operator]
        c = c / c.norm(dim=1, keepdim=True)  # type: ignore[operator, union-attr]
        full = sum(part.shape[1] for part in queue) >= 8
        for crop in range(2):
            joined = [z[crop], *[part[crop] for part in queue]] if full else [z[crop]]
            q = torch.exp((torch.cat(joined)[:12] @ c.T).double() / recipe.sinkhorn_epsilon).T
            q = q / q.sum()
            for _ in range(3):
                q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
                q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
            codes = (q * q.shape[1]).T.float()[:4]
            torch.testing.assert_close(targets.probs[crop], codes, rtol=1e-4, atol=1e-5)
        queue = [z, *queue][:2]

        with torch.no_grad():  # the prototypes move, so that scores of earlier steps would be wrong
            for parameter in student.head.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        branch.update(step, student)
