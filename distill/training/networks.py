"""From a recipe to the networks: the target branch that all students share, and one Learner per student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from robx.distill.objectives.build import build_objective
from robx.distill.recipes import Recipe
from robx.distill.students.student import StudentNet, build_student
from robx.distill.targets.branches import TargetBranch, TeacherBranch
from robx.distill.targets.build import StoredTeacher, build_branch
from robx.distill.teachers.frozen_heads import PrototypeHead
from robx.distill.teachers.teacher import Teacher
from robx.distill.training.initial import Initial
from robx.distill.training.learner import HALF, Learner
from robx.distill.training.processes import Processes
from robx.errors import InputError


@dataclass(frozen=True)
class Networks:
    """What a run trains, and against what."""

    learners: list[Learner]
    branch: TargetBranch | None  # shared by all students; None for base methods, whose learners have their own
    mask_grid: tuple[int, int] | None  # of a global crop, if the method masks or drops patches of a student


def build_networks(
    recipe: Recipe,
    students: Sequence[str],
    *,
    teacher: Teacher | None,
    stored: StoredTeacher | None = None,
    processes: Processes,
    steps: int,
    steps_per_epoch: int,
    compile: bool = False,
    init: Mapping[str, Initial] | None = None,
) -> Networks:
    """Students with initial weights that depend only on the recipe's seed, and their target branch.

    Args:
        recipe: of all students.
        students: timm names.
        teacher: on its device; None for a base method or stored targets.
        stored: targets used instead of a teacher.
        processes: where and among whom.
        steps: optimiser steps of the whole run.
        steps_per_epoch: optimiser steps of one epoch.
        compile: torch.compile the students and the teacher.
        init: weights to start from by student, instead of random ones.

    Raises:
        InputError: a student that cannot serve the recipe.
    """
    objective = build_objective(recipe)
    if teacher is not None:
        prepare_network(teacher, processes.device)
        teacher.enlarge_to(recipe.teacher_shape)
        if recipe.precision != "fp32":
            teacher.keep_in(HALF[recipe.precision])
    learners: list[Learner] = []
    shared: TargetBranch | None = None if stored is None else stored.branch
    for name in students:
        torch.manual_seed(recipe.seed)
        net = build_student(name, recipe, teacher or stored)
        if init and name in init:
            init[name].load_into(net.trunk)
        prepare_network(net, processes.device)
        if recipe.quantize is not None:
            _require_plain(name, net, compile=compile)
        own = None
        if recipe.base or (teacher is not None and shared is None):
            branch = build_branch(
                recipe, objective, student=net, teacher=teacher, steps=steps, steps_per_epoch=steps_per_epoch
            )
            if isinstance(branch, TeacherBranch):
                shared = branch
            else:
                own = branch
        learners.append(
            Learner(name, net, recipe=recipe, objective=objective, processes=processes, branch=own, compile=compile)
        )
    if compile and teacher is not None:
        teacher.compile()
    return Networks(learners, shared, _mask_grid([learner.net for learner in learners], recipe))


def share_teacher(teacher: Teacher, processes: Processes) -> None:
    """Make sure that all processes use the same teacher.

    Nodes without a shared cache fit prototypes separately, and sums on a GPU are not deterministic: all processes take
    the prototypes of the first one.

    Raises:
        InputError: the processes were given different weights.
    """
    if len(files := set(processes.gather(teacher.info.sha256))) > 1:
        short = ", ".join(sorted(sha256[:12] for sha256 in files))
        raise InputError(
            f"the processes loaded different weights of {teacher.name} (sha256 {short}): give all of them the same file"
        )
    if isinstance(teacher.head, PrototypeHead) and teacher.head.mean is not None:
        processes.copy_from_first([teacher.head.mean, teacher.head.prototypes])


def prepare_network(net: nn.Module, device: torch.device) -> None:
    """Move a network to its device, convolutions in channels-last memory format, as the crops are."""
    net.to(device)
    if sum(isinstance(module, nn.Conv2d) for module in net.modules()) > 1:
        net.to(memory_format=torch.channels_last)


def _require_plain(name: str, net: StudentNet, *, compile: bool) -> None:
    """Refuse to simulate int8 in what is not what will be exported."""
    if compile:
        raise InputError("--quantize int8 cannot be compiled: drop --compile")
    fused = ("fuse", "reparameterize", "switch_to_deploy")  # what timm.utils.reparameterize_model looks for
    if any(hasattr(module, method) for module in net.trunk.modules() for method in fused):
        raise InputError(
            f"{name} has branches that become one convolution in an export, so --quantize int8 would simulate another "
            "network: use robx export --int8 --heal instead"
        )


def _mask_grid(nets: Sequence[StudentNet], recipe: Recipe) -> tuple[int, int] | None:
    grids = {net.mask_grid(recipe.crop_shape) or net.drop_grid(recipe.crop_shape) for net in nets} - {None}
    if len(grids) > 1:
        raise InputError(f"the students have different patch grids ({grids}): distil them in separate runs")
    return grids.pop() if grids else None
