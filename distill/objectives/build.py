"""The table of objectives. A new one is its own file, a row here, and its preset in presets.py."""

from __future__ import annotations

from robx.distill.objectives.base import Objective
from robx.distill.objectives.kd import SupervisedKd
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_ibot import RobIbot
from robx.distill.objectives.rob_msn import RobMsn
from robx.distill.objectives.rob_swav import RobSwav
from robx.distill.recipes import Recipe

OBJECTIVES: dict[str, type[Objective]] = {
    "dino": RobDino,
    "ibot": RobIbot,
    "msn": RobMsn,
    "swav": RobSwav,
    "kd": SupervisedKd,
}


def build_objective(recipe: Recipe) -> Objective:
    """The objective that `recipe` describes."""
    return OBJECTIVES[recipe.objective].of(recipe)
