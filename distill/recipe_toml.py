"""Recipes as TOML: reading the user's file, and printing every key with its value and meaning."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from robx.distill.recipes import Recipe
from robx.store.toml import read_toml, toml_value

# The first key of each section.
_SECTIONS = {
    "objective": "Objective",
    "ema_momentum": "Base methods only (--teacher ema)",
    "drop_path": "Student",
    "crop_size": "Crops",
    "optimizer": "Optimisation",
}


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file; ``robx.distill.recipes.override`` checks them.

    Raises:
        InputError: the file is missing or is not TOML.
    """
    return read_toml(path, what="a recipe in TOML (see robx recipe)")


def to_toml(recipe: Recipe) -> str:
    """Every key of the recipe, with its meaning as a comment; ``read_recipe`` reads it back to the same recipe."""
    lines = []
    for name, kind in typing.get_type_hints(Recipe, include_extras=True).items():
        value = getattr(recipe, name)
        if name in _SECTIONS:
            lines += ["", f"# {_SECTIONS[name]}"]
        lines.append(f"{name} = {toml_value('none' if value is None else value)}".ljust(38))
        lines[-1] += f"  # {kind.__metadata__[0]}"
    return "\n".join(lines[1:]) + "\n"
