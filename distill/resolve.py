"""From what the user gave to a run's settings: the preset, then the recipe file, then the options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robx.distill.presets import TINY
from robx.distill.recipes import Recipe, override, preset, read_toml
from robx.distill.targets.stored import read_info
from robx.distill.teachers.choose import default_objective
from robx.distill.training.networks import student_kind
from robx.errors import InputError


def resolve_recipe(
    *,
    student: str,
    teacher: str | None,
    targets: Path | None = None,
    objective: str | None = None,
    file: Path | None = None,
    options: Mapping[str, Any],
) -> Recipe:
    """The preset of the objective and the student's kind, changed by the recipe file, changed by the options.

    Args:
        student: a timm name.
        teacher: as --teacher has it; "ema" means the base method.
        targets: stored targets in the teacher's place.
        objective: None takes the file's, the stored targets', or the one that the teacher was pretrained with.
        file: a recipe in TOML.
        options: keys of Recipe; None means not given. `lr` is taken as it is, at any batch size.

    Raises:
        InputError: an unknown name or key, or values that contradict each other.
        ArtifactError: there are no targets.
    """
    values = read_toml(file) if file else {}
    base = teacher == "ema"
    if bool(values.get("base", base)) != base:
        raise InputError(f"{file}: base = {str(values['base']).lower()} contradicts --teacher {teacher}")
    method: Any = objective or values.get("objective")
    if method is None and targets is not None:
        method = read_info(targets).decided_by.get("objective")
    kind = student_kind(student)
    recipe = preset(method or _default_objective(teacher), kind, base=base)
    if kind == "vit" and "_tiny_" in student:
        recipe = override(recipe, TINY.get(recipe.objective, {}))
    recipe = override(recipe, values | {"objective": recipe.objective}, where=str(file or "recipe"))
    given = {name: value for name, value in options.items() if value is not None}
    if "lr" in given:
        share = min(1.0, recipe.final_lr / recipe.lr) if recipe.lr else 0.0  # of its peak, where the recipe's rate ends
        given |= {"lr_batch": None, "warmup_lr": 0.0, "final_lr": share * given["lr"]}
    return override(recipe, given, where="options")


def default_workers() -> int:
    """Half of this process's share of the processors, at least one, at most eight: the other half computes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started on this machine
    return max(1, min(8, len(os.sched_getaffinity(0)) // (2 * here)))


def _default_objective(teacher: str | None) -> Any:
    """The method that the teacher was pretrained with; msn for one whose prototypes are fitted; dino for ema."""
    if teacher is None or teacher == "ema":
        return "dino"
    return default_objective(teacher)
