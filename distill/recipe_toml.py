"""Recipes as TOML: reading the user's file, and printing every key with its value and meaning."""

from __future__ import annotations

import json
import tomllib
import typing
from pathlib import Path
from typing import Any

from robx.distill.recipes import Recipe
from robx.errors import InputError

_MAX_BYTES = 1024 * 1024
# The first key of each section.
_SECTIONS = {
    "objective": "Objective",
    "ema_momentum": "Base methods only (--teacher ema)",
    "drop_path": "Student",
    "crop_size": "Crops",
    "optimizer": "Optimisation",
}


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a recipe file; ``robx.distill.recipes.override`` checks them.

    Raises:
        InputError: the file is missing or is not TOML.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MAX_BYTES):
            raise InputError(f"{path} is not a regular file of at most {_MAX_BYTES} bytes: give a recipe in TOML")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a recipe in TOML") from error
    except RecursionError:
        raise InputError(f"{path} is not valid TOML (it is nested too deeply): see robx recipe") from None
    except ValueError as error:  # of TOML, of its encoding, or of an integer with thousands of digits
        raise InputError(f"{path} is not valid TOML ({error}): see robx recipe") from error


def to_toml(recipe: Recipe) -> str:
    """Every key of the recipe, with its meaning as a comment; ``read_toml`` reads it back to the same recipe."""
    lines = []
    for name, kind in typing.get_type_hints(Recipe, include_extras=True).items():
        if name in _SECTIONS:
            lines += ["", f"# {_SECTIONS[name]}"]
        lines.append(f"{name} = {_value(getattr(recipe, name))}".ljust(38) + f"  # {kind.__metadata__[0]}")
    return "\n".join(lines[1:]) + "\n"


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)  # bool, number and string are written alike in JSON and TOML
