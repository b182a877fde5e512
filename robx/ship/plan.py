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

Paths are relative to the working directory, as on the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robx.distill.recipes import Recipe
from robx.distill.training.run import Options
from robx.errors import InputError, did_you_mean
from robx.store.toml import read_toml, toml_value

Table = Mapping[str, Any]
Verbs = Mapping[str, Callable[..., Any]]  # "distill", "export", "eval", "bench", "report" -> the function of robx.api

PLAN = "plan.toml"  # in the output folder: the plan as it was run
# What the plan itself sets in each stage.
_SET = {
    "distill": ("teacher", "student", "data", "out", "fresh", "progress"),
    "export": ("student", "data", "progress"),
    "eval": ("models", "data", "progress"),
    "bench": ("bundles", "progress"),
    "report": ("folders", "out"),
}
# Keys of a stage that are not arguments of its function: `optional` stages may fail, `formats` picks bundles.
_OWN = {"export": ("optional",), "bench": ("optional", "formats")}
_MARGIN = {"export": "max_drop", "eval": "margin", "report": "margin"}  # the arguments that `margin` sets
_EVALUATION = {"knn": True, "fidelity": True}


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
    eval: Table = field(default_factory=lambda: dict(_EVALUATION))
    bench: tuple[Table, ...] = ({},)  # on this machine
    report: Table = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a plan without an export, and margins that are no numbers of points."""
        if not self.export:
            raise InputError("the plan has no export: add an [[export]] table with a format, or --format")
        if not 0 <= self.margin < math.inf:
            raise InputError(f"margin must be a number of points of 0 or more, got {self.margin}")
        for name in ("teacher", "student", "data", "out"):
            _check_value(name, getattr(self, name))
        for stage, table in self.tables():
            for key, value in table.items():
                _check_value(f"[{stage}] {key}", value)

    def tables(self) -> list[tuple[str, Table]]:
        """Every table with the name of its stage."""
        exports, benches = ([(name, table) for table in getattr(self, name)] for name in ("export", "bench"))
        return [("distill", self.distill), *exports, ("eval", self.eval), *benches, ("report", self.report)]

    def with_margin(self, stage: str) -> dict[str, Any]:
        """The argument of a stage that the plan's `margin` sets."""
        return {_MARGIN[stage]: self.margin} if stage in _MARGIN else {}

    def with_distill(self, **changed: Any) -> Plan:
        """The plan with other values in [distill]."""
        return dataclasses.replace(self, distill={**self.distill, **changed})

    def to_toml(self) -> str:
        """The plan as a file that `read_plan` reads back to an equal plan."""
        top = {name: str(getattr(self, name)) for name in ("teacher", "student", "data", "out")}
        parts = [_lines({**top, "margin": self.margin})]
        for name, table in self.tables():
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
    known = {f.name: f for f in dataclasses.fields(Plan)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{where}: unknown key {name}: {_hint(name, known)}")
        _check_type(name, value, where)
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{where}: {', '.join(missing)} missing: add {'it' if len(missing) == 1 else 'them'}")
    given: dict[str, Any] = {n: tuple(values[n]) if n in ("export", "bench") else values[n] for n in values}
    return Plan(**given | {"data": Path(given["data"]), "out": Path(given["out"])})


def check_keys(plan: Plan, verbs: Verbs) -> None:
    """Refuse a key that is not an argument of its stage's function, or that the plan sets itself.

    Raises:
        InputError: the message names the table and the key, and the keys that are known.
    """
    for stage, table in plan.tables():
        known = _arguments(stage, verbs[stage])
        for key in table:
            if key in _SET[stage]:
                raise InputError(f"[{stage}] {key}: the plan sets it from its top level, not in this table: remove it")
            if key not in known:
                raise InputError(f"[{stage}] unknown key {key}: {_hint(key, known)}")
        if stage == "export" and "format" not in table:
            raise InputError('[[export]] has no format: add one, such as format = "onnx"')


def _arguments(stage: str, verb: Callable[..., Any]) -> set[str]:
    """The keys that a table of `stage` may have."""
    known = {*inspect.signature(verb).parameters, *_OWN.get(stage, ())} - {"settings", *_SET[stage]}
    if stage == "distill":
        known |= {f.name for cls in (Recipe, Options) for f in dataclasses.fields(cls)} - {*_SET[stage]}
    return known


def _check_type(name: str, value: Any, where: str) -> None:
    kinds: dict[str, tuple[type, ...]] = {"margin": (int, float), "data": (str, Path), "out": (str, Path)}
    if name in ("export", "bench"):
        if not isinstance(value, list | tuple) or not all(isinstance(table, Mapping) for table in value):
            raise InputError(f"{where}: {name} must be a list of tables: write [[{name}]]")
    elif name in _SET:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name} must be a table: write [{name}]")
    elif isinstance(value, bool) or not isinstance(value, kinds.get(name, (str,))):
        raise InputError(f"{where}: {name} must be {'a number' if name == 'margin' else 'a string'}, got {value!r}")


def _check_value(name: str, value: Any) -> None:
    """Refuse what a plan file cannot hold: tables within tables, dates, text that is not Unicode."""
    for one in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(one, str | bool | int | float | Path):
            raise InputError(f"{name}: {one!r} is not a string, a number, true or false: give one of these")
        if isinstance(one, str | Path) and not str(one).isprintable():
            raise InputError(f"{name}: {str(one)!r} has characters that cannot be printed: give another name")


def _hint(name: str, known: Any) -> str:
    return did_you_mean(name, known, otherwise=f"known are {', '.join(sorted(known))}")


def _lines(table: Table) -> str:
    return "\n".join(f"{key} = {toml_value(value)}" for key, value in table.items())
