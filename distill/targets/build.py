"""From a recipe to the target branch; from a run to stored targets, written or read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import nn

from robx.distill.objectives.base import Objective
from robx.distill.recipes import Recipe
from robx.distill.targets.branches import EmaBranch, OwnBranch, TargetBranch, TeacherBranch
from robx.distill.targets.centering import TargetProcessor
from robx.distill.targets.stored import StoredBranch, TargetsInfo, read_info
from robx.distill.targets.stored_writer import TargetWriter, WritingBranch
from robx.distill.teachers.teacher import Teacher
from robx.errors import InputError, counted
from robx.images.sources import ImageSource
from robx.records import TeacherInfo, from_json, to_json
from robx.store.files import read_json, write_json

NO_TEACHER = "--store-targets needs a teacher: a moving average has no reusable targets; drop the option"


def build_branch(
    recipe: Recipe,
    objective: Objective,
    *,
    student: nn.Module,
    teacher: Teacher | None,
    steps: int,
    steps_per_epoch: int,
) -> TeacherBranch | EmaBranch | OwnBranch:
    """The branch that `recipe` describes: the teacher's, or a base method's when there is no teacher."""
    processor = TargetProcessor.of(recipe, objective, steps_per_epoch=steps_per_epoch)
    if teacher is not None:
        return TeacherBranch(
            teacher,
            objective,
            processor=processor,
            crops=recipe.target_crops,
            maps=recipe.stage_weight > 0,
            scores=recipe.prototype_weight > 0,
        )
    if objective.traits.self_targets and not any(recipe.ema_momentum):
        return OwnBranch(student, processor)
    return EmaBranch(
        student,
        objective,
        steps=steps,
        momentum=recipe.ema_momentum,
        schedule=objective.traits.momentum,
        processor=processor,
        copied=objective.traits.not_averaged,
    )


@dataclass
class StoredTeacher:
    """Stored targets, and the facts about the teacher that made them: a TeacherSpec."""

    branch: StoredBranch
    info: TeacherInfo
    name: str
    num_prototypes: int
    width: int = 0  # features are not stored
    patch_size: int | None = None
    patch_prototypes: int | None = None
    map_strides: Mapping[int, int] = field(default_factory=dict)  # nor are maps


def open_targets(folder: Path, recipe: Recipe, source: ImageSource) -> StoredTeacher:
    """Targets that an earlier run stored, for this recipe and these images.

    Raises:
        ArtifactError: no targets there, or damaged ones.
        InputError: they were made from other crops or images, which the message names, or are of too few epochs.
    """
    info = read_info(folder)
    teacher = from_json(TeacherInfo, read_json(folder / "teacher.json"), where=str(folder / "teacher.json"))
    expect = TargetsInfo.of(
        recipe,
        prototypes=info.prototypes,
        images=len(source),
        data_fingerprint=source.fingerprint,
        teacher_sha256=teacher.sha256,
    )
    branch = StoredBranch(folder, expect=expect)
    wanted, stored = recipe.target_epochs or recipe.epochs, set(branch.epochs)
    complete = next((epoch for epoch in range(wanted) if epoch not in stored), wanted)
    if complete < wanted:
        remedy = f"give --target-epochs {complete} to replay them, or store more" if complete else "store them first"
        raise InputError(f"{folder} has targets of {counted(complete, 'epoch')}, and the run needs {wanted}: {remedy}")
    return StoredTeacher(branch, teacher, teacher.name, info.prototypes)


def stored_info(recipe: Recipe, *, teacher: Teacher, source: ImageSource, k: int) -> TargetsInfo:
    """What a run writes into the targets.json of its stored targets; `k` prototypes are kept of each."""
    return TargetsInfo.of(
        recipe,
        prototypes=teacher.num_prototypes,
        images=len(source),
        data_fingerprint=source.fingerprint,
        teacher_sha256=teacher.info.sha256,
        k=k,
    )


def store_targets(
    branch: TargetBranch | None, folder: Path, *, recipe: Recipe, teacher: Teacher | None, source: ImageSource, k: int
) -> WritingBranch:
    """The branch, with its targets written to `folder` as they are made; `k` prototypes are kept of each.

    Raises:
        InputError: there is no teacher, or the folder holds targets of another run or files that robx did not write.
    """
    if branch is None or teacher is None:
        raise InputError(NO_TEACHER)
    info = stored_info(recipe, teacher=teacher, source=source, k=k)
    writer = TargetWriter(folder, info, epochs=recipe.target_epochs or recipe.epochs)
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        write_json(folder / "teacher.json", to_json(teacher.info))
    return WritingBranch(branch, writer)
