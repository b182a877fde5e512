"""What ``robx ship`` runs, as a TOML file: the networks, the images, and one table for each stage.

    teacher = "dino_vits16"
    student = "resnet18"
    data = "images/"            # labelled, with train/ and test/ inside, for the accuracy in the report
    out = "runs/r18"
    margin = 1.0                # points of accuracy that a faster model may lose

    [distill]                   # arguments of robx.api.distill, keys of the recipe included
    epochs = 100

    [[export]]                  # arguments of robx.api.export; one table for each bundle
    format = "openvino"
    int8 = true

    [eval]                      # arguments of robx.api.evaluate

    [[bench]]                   # arguments of robx.api.bench; one table for each device
    device = "ssh://pi@raspberrypi"
    formats = ["onnx", "openvino"]

    [report]                    # arguments of robx.api.report
    budgets = [20]

``eval = false``, ``bench = false`` and ``report = false`` leave a stage out. Paths are relative to the working
directory, as on the command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from robx.arguments import check_types, home_expanded, types_of
from robx.distill.recipes import Recipe
from robx.distill.training.run import Options
from robx.errors import InputError, did_you_mean
from robx.ship.command_line import option_keys
from robx.store.toml import read_toml, toml_value

Table = Mapping[str, Any]
Verbs = Mapping[str, Callable[..., Any]]  # "distill", "export", "eval", "bench", "report" -> the function of robx.api

PLAN = "plan.toml"  # in the output folder: the plan as it was run
# Arguments that the plan itself sets in each stage.
_SET_BY_PLAN = {
    "distill": ("teacher", "student", "data", "out", "fresh", "progress"),
    "export": ("student", "data", "progress"),
    "eval": ("models", "data", "progress"),
    "bench": ("bundles", "progress"),
    "report": ("folders", "out"),
}
# Arguments that make no sense in a plan, and why not.
_NOT_IN_PLAN = {
    "distill": {"targets": "stored targets replace the teacher, which every plan has: use robx distill --targets DIR"},
}
# Keys of a stage that are not arguments of its function: `optional` stages may fail, `formats` picks bundles.
_STAGE_KEYS: dict[str, dict[str, Any]] = {
    "export": {"optional": bool},
    "bench": {"optional": bool, "formats": Sequence[str] | str},
}
_SWITCHES = ("eval", "bench", "report")  # stages that `false` leaves out
_MARGIN = {"export": "max_drop", "eval": "margin", "report": "margin"}  # the arguments that `margin` sets
_EVALUATION = {"knn": True, "fidelity": True}


class Entry(NamedTuple):
    """One table of a plan, which is one stage of its run."""

    stage: str  # "distill", "export", "eval", "bench" or "report"
    table: Table
    label: str  # as it stands in the file: "[eval]"; of several of one name "[[export]] 2"
    number: int  # in the order of the run, from 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A student's way from its teacher to a report; see the module for the meaning of each table."""

    teacher: str
    student: str
    data: Path
    out: Path
    margin: float = 1.0
    distill: Table = field(default_factory=dict)
    export: tuple[Table, ...]
    eval: Table | None = field(default_factory=lambda: dict(_EVALUATION))
    bench: tuple[Table, ...] = ({},)  # on this machine
    report: Table | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a plan without an export, and a margin that is not a number of points."""
        if not self.export:
            raise InputError("the plan has no export: add an [[export]] table with a format, or --format")
        if not 0 <= self.margin < math.inf:
            raise InputError(f"margin must be a number of points of 0 or more, got {self.margin}")
        for name in ("teacher", "student", "data", "out"):
            _check_value(name, getattr(self, name))
        for entry in self.tables():
            for key, value in entry.table.items():
                _check_value(f"{entry.label}: {key}", value)

    def tables(self) -> list[Entry]:
        """The tables of all stages that are run, in their order."""
        found: list[Entry] = []
        for stage in ("distill", "export", "eval", "bench", "report"):
            given = getattr(self, stage)
            if not isinstance(given, tuple):
                found += [] if given is None else [Entry(stage, given, f"[{stage}]", len(found) + 1)]
                continue
            for place, table in enumerate(given, start=1):
                label = f"[[{stage}]] {place}" if len(given) > 1 else f"[[{stage}]]"
                found.append(Entry(stage, table, label, len(found) + 1))
        return found

    def with_margin(self, stage: str) -> dict[str, Any]:
        """The argument of a stage that the plan's `margin` sets."""
        return {_MARGIN[stage]: self.margin} if stage in _MARGIN else {}

    @property
    def own_margins(self) -> list[str]:
        """The labels of tables with a margin of their own, which counts instead of the plan's."""
        return [entry.label for entry in self.tables() if _MARGIN.get(entry.stage) in entry.table]

    def with_distill(self, **changed: Any) -> Plan:
        """The plan with other values in [distill]."""
        return dataclasses.replace(self, distill={**self.distill, **changed})

    def to_toml(self) -> str:
        """The plan as a file that `read_plan` reads back to an equal plan."""
        top = {name: str(getattr(self, name)) for name in ("teacher", "student", "data", "out")}
        off = {name: False for name in _SWITCHES if getattr(self, name) in (None, ())}
        parts = [_lines({**top, "margin": self.margin, **off})]
        for name, table, _, _ in self.tables():
            heading = f"[[{name}]]" if isinstance(getattr(self, name), tuple) else f"[{name}]"
            parts.append("\n".join((heading, _lines(table))).rstrip())
        return "\n\n".join(parts) + "\n"


def read_plan(path: Path, **replaced: Any) -> Plan:
    """The plan in a TOML file.

    Args:
        path: the file.
        replaced: values that replace those of the file: `out`, `data`, ...; None means not given.

    Raises:
        InputError: the file is missing or is not TOML, has an unknown key, or lacks one.
    """
    return make_plan(read_toml(path, what="a plan in TOML"), where=str(path), **replaced)


def make_plan(values: Table, *, where: str, **replaced: Any) -> Plan:
    """A plan from nested tables, as TOML gives them; `where` is named in errors.

    Raises:
        InputError: an unknown key, a missing one, or a value of the wrong type.
    """
    values = {**values, **{name: value for name, value in replaced.items() if value is not None}}
    values = home_expanded(values)  # no value but a path starts with "~"
    known = {f.name: f for f in dataclasses.fields(Plan)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{where}: unknown key {name}: {_hint(name, known)}")
        _check_type(name, value, where)
    values = {name: value for name, value in values.items() if not (name in _SWITCHES and value is True)}
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{where}: {', '.join(missing)} missing: add {'it' if len(missing) == 1 else 'them'}")
    given: dict[str, Any] = {n: tuple(values[n] or ()) if n in ("export", "bench") else values[n] for n in values}
    given |= {name: None for name in ("eval", "report") if given.get(name) is False}
    return Plan(**given | {"data": Path(given["data"]), "out": Path(given["out"])})


def check_keys(plan: Plan, verbs: Verbs) -> None:
    """Refuse a key that is not an argument of its stage's function, one that the plan sets itself, and a wrong type.

    Raises:
        InputError: the message names the table and the key, and the keys that are known or the type that it takes.
    """
    for entry in plan.tables():
        stage, label = entry.stage, entry.label
        known = table_types(stage, verbs[stage])
        for key in entry.table:
            if key in _SET_BY_PLAN[stage]:
                raise InputError(f"{label}: {key}: the plan sets it from its top level, not in this table: remove it")
            if why := _NOT_IN_PLAN.get(stage, {}).get(key):
                raise InputError(f"{label}: {key}: {why}")
            if key not in known:
                raise InputError(f"{label}: unknown key {key}: {_key_hint(stage, key, known)}")
        if stage == "export" and "format" not in entry.table:
            raise InputError(f'{label} has no format: add one, such as format = "onnx"')
        recipe = {f.name for f in dataclasses.fields(Recipe)} if stage == "distill" else set()
        try:  # the recipe checks its keys itself: some also take "none"
            check_types({name: kind for name, kind in known.items() if name not in recipe}, entry.table)
        except InputError as error:
            raise InputError(f"{label}: {error}") from None


def table_types(stage: str, verb: Callable[..., Any]) -> dict[str, Any]:
    """The keys that a table of `stage` may have, with their types; `verb` is its function of ``robx.api``."""
    known = types_of(verb) | _STAGE_KEYS.get(stage, {})
    if stage == "distill":
        known |= get_type_hints(Recipe) | get_type_hints(Options)
    others = {*_SET_BY_PLAN[stage], *_NOT_IN_PLAN.get(stage, ())}
    return {name: kind for name, kind in known.items() if name not in others}


def _key_hint(stage: str, key: str, known: Mapping[str, Any]) -> str:
    """What to write instead of an unknown key: that of the option of this name, or one that is similar."""
    if stage == "distill" and key == "like":
        return 'like is a line of a recipe file: write recipe = "quick"'
    option = f"--{key.lstrip('-').replace('_', '-')}"
    meant = option_keys(stage).get(option)
    if meant in known:
        return f"{option} is the key {meant} in a plan"
    if meant in ("teacher", "student", "data", "out"):
        return f"{option} is the key {meant} at the top of the plan"
    return _hint(key, known)


def _check_type(name: str, value: Any, where: str) -> None:
    kinds: dict[str, tuple[type, ...]] = {"margin": (int, float), "data": (str, Path), "out": (str, Path)}
    if name in _SWITCHES and isinstance(value, bool):
        return
    if name in ("export", "bench"):
        if not isinstance(value, list | tuple) or not all(isinstance(table, Mapping) for table in value):
            raise InputError(f"{where}: {name} must be a list of tables: write [[{name}]]")
    elif name in _SET_BY_PLAN:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name} must be a table: write [{name}]")
    elif isinstance(value, bool) or not isinstance(value, kinds.get(name, (str,))):
        raise InputError(f"{where}: {name} must be {'a number' if name == 'margin' else 'a string'}, got {value!r}")
    elif name in ("data", "out") and not str(value):
        raise InputError(f"{where}: {name} is an empty path: give a path, or . for the current folder")


def _check_value(name: str, value: Any) -> None:
    """Refuse what a plan file cannot hold: tables within tables, dates, text that is not Unicode."""
    if isinstance(value, list | tuple):
        for one in value:
            _check_value(name, one)
    elif not isinstance(value, str | bool | int | float | Path):
        raise InputError(f"{name}: {value!r} is not a string, a number, true or false: give one of these")
    elif isinstance(value, str | Path) and not str(value).isprintable():
        raise InputError(f"{name}: {str(value)!r} has characters that cannot be printed: give another name")


def _hint(name: str, known: Any) -> str:
    return did_you_mean(name, known, otherwise=f"known are {', '.join(sorted(known))}")


def _lines(table: Table) -> str:
    return "\n".join(f"{key} = {toml_value(value)}" for key, value in table.items())
