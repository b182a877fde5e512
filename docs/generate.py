"""Write docs/recipe-keys.md, docs/plan-keys.md and docs/report.schema.json from the code: python docs/generate.py."""

from __future__ import annotations

import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

from robx import api
from robx.arguments import described
from robx.distill.presets import BASE, ROB
from robx.distill.recipe_toml import _SECTIONS
from robx.distill.recipes import _RANGES, Recipe, preset
from robx.distill.training.run import Options
from robx.eval.report.schema import json_schema
from robx.ship.plan import table_types

PAGE = Path(__file__).with_name("recipe-keys.md")
PLAN_PAGE = PAGE.with_name("plan-keys.md")
SCHEMA = PAGE.with_name("report.schema.json")
HEAD = """# Every recipe key

<!-- Written by docs/generate.py: edit the dataclass Recipe in distill/recipes.py instead. -->

These keys can be set in the file given with `--recipe`, and are keyword arguments of `robx.api.distill`. The values are
those of a ViT student with a teacher; a column has a value where the objective's recipe differs from the default. For
CNN students see [below](#cnn-students). `"none"` switches an optional key off. `robx recipe
OBJECTIVE --student NAME` prints the exact values for one student.
"""


PLAN_HEAD = """# Every key of a plan

<!-- Written by docs/generate.py: edit the docstrings in robx/api.py instead. -->

The keys of the tables of a [plan](ship.md). Each table takes the arguments of the function of `robx.api` with the same
meaning. A key that is left out has its default, which the meaning may call None. At the top of the plan stand
`teacher`, `student`, `data`, `out` and `margin`.
"""
# Keys of the plan itself.
PLAN_OWN = {
    "optional": "if the stage fails, the plan goes on and its exit status is not affected.",
    "formats": "formats of the bundles to measure; without it every bundle, on this machine those that can run on it.",
}


def main() -> None:
    """Write the pages and the schema."""
    PAGE.write_text(page(), encoding="utf-8")
    PLAN_PAGE.write_text(plan_page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")


def schema() -> str:
    """The JSON Schema of a report."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_keys(), *_differences()]) + "\n"


def plan_page() -> str:
    """The page of the keys of a plan."""
    lines = [PLAN_HEAD]
    for stage, verb in api.VERBS.items():
        several = stage in ("export", "bench")
        lines += [f"## `{f'[[{stage}]]' if several else f'[{stage}]'}`", ""]
        if stage == "distill":
            lines += ["Every [key of the recipe](recipe-keys.md), and:", ""]
        lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            _plan_row(stage, name, kind) for name, kind in table_types(stage, verb).items() if _is_listed(stage, name)
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _is_listed(stage: str, name: str) -> bool:
    """Not the keys of the recipe, which have a page of their own."""
    return stage != "distill" or name not in typing.get_type_hints(Recipe) or name == "objective"


def _plan_row(stage: str, name: str, kind: Any) -> str:
    function = api.VERBS[stage]
    parameter = inspect.signature(function).parameters.get(name)
    default = parameter.default if parameter is not None else getattr(Options(), name, None)
    shown = "" if default in (None, inspect.Parameter.empty, (), "") else f"`{_shown(default)}`"
    said = _documented(function).get(name) or PLAN_OWN.get(name) or _commented().get(name, "")
    cells = (f"`{name}`", described(kind), shown, said.replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


def _documented(function: Any) -> dict[str, str]:
    """What the docstring says of each argument."""
    section = re.search(r"Args:\n(.*?)(\n\n|\Z)", inspect.getdoc(function) or "", flags=re.DOTALL)
    found = (
        re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] + "\n", flags=re.DOTALL | re.MULTILINE)
        if section
        else []
    )
    return {name: " ".join(text.split()) for name, text in found}


def _commented() -> dict[str, str]:
    """What the comments in Options say of each field."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Options), flags=re.MULTILINE))


def _keys() -> list[str]:
    """One table for each section of the recipe."""
    ranges = {name: f"{low:g} to {high:g}" for name, low, high in _RANGES}
    methods = {name: preset(name, "vit") for name in ROB}
    default, lines = Recipe(objective="dino"), list[str]()
    for name, kind in typing.get_type_hints(Recipe, include_extras=True).items():
        if name in _SECTIONS:
            lines += [f"## {_SECTIONS[name]}", ""]
            lines += [f"| key | meaning | range | default | {' | '.join(methods)} |", f"| {' | '.join(['---'] * 9)} |"]
        start = getattr(default, name)
        values = [getattr(recipe, name) for recipe in methods.values()]
        cells = ["" if value == start else _shown(value) for value in values]
        meaning = kind.__metadata__[0].replace("|", "\\|")
        row = (
            f"`{name}`",
            meaning,
            ranges.get(name, _choices(kind)),
            "" if name == "objective" else _shown(start),
            *cells,
        )
        lines.append(f"| {' | '.join(row)} |")
        if name in _last_of_sections():
            lines.append("")
    return lines


def _differences() -> list[str]:
    """What CNN students and base methods change."""
    lines = ["## CNN students", "", "With a CNN student the recipe of a ViT changes in these keys.", ""]
    lines += _table({name: (preset(name, "vit"), preset(name, "cnn")) for name in ROB})
    lines += ["", "## Base methods", "", "With `--teacher ema`, the method without a teacher, these change.", ""]
    pairs = {name: (preset(name, "vit"), preset(name, "vit", base=True)) for name in BASE}
    return lines + _table(pairs)


def _table(pairs: dict[str, tuple[Recipe, Recipe]]) -> list[str]:
    changed = [
        name
        for name in typing.get_type_hints(Recipe)
        if any(getattr(before, name) != getattr(after, name) for before, after in pairs.values())
    ]
    rows = [f"| key | {' | '.join(pairs)} |", f"| {' | '.join(['---'] * (len(pairs) + 1))} |"]
    for name in changed:
        after = [
            _shown(getattr(new, name)) if getattr(new, name) != getattr(old, name) else ""
            for old, new in pairs.values()
        ]
        rows.append(f"| `{name}` | {' | '.join(after)} |")
    return rows


def _last_of_sections() -> set[str]:
    names = list(typing.get_type_hints(Recipe))
    return {names[names.index(first) - 1] for first in _SECTIONS if names.index(first)} | {names[-1]}


def _choices(kind: Any) -> str:
    """The values that a Literal allows."""
    inner = typing.get_args(kind)[0]
    return ", ".join(map(str, typing.get_args(inner))) if typing.get_origin(inner) is typing.Literal else ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
