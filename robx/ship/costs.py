"""What a plan will cost and what is missing, before hours are spent: ``robx ship --dry-run``.

A training step and a forward pass of the student are measured briefly; images, models and processes are counted.
Nothing is written or downloaded.
"""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from robx.distill.recipes import Recipe
from robx.distill.resolve import DistillSettings, resolve_recipe
from robx.distill.train import estimate
from robx.errors import RobxError, counted, duration
from robx.export.image_splits import JUDGING_IMAGES, SCREENING_IMAGES
from robx.formats import FORMATS, RUNTIMES
from robx.runtime.bench.profiles import find_profile
from robx.runtime.doctor import examine
from robx.ship.checks import check_plan, naming_table
from robx.ship.plan import Entry, Plan, Table, Verbs
from robx.ship.run import STATE
from robx.ship.stages import Stages, State, precision_of, wanted_formats
from robx.trunk import build_trunk

_FORWARD_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage of a plan."""

    title: str
    cost: str
    missing: str = ""  # what to install or connect before it can run
    optional: bool = False


def estimate_plan(plan: Plan, verbs: Verbs, *, fresh: bool = False) -> Iterator[StageCost]:
    """Yield the cost of each stage, in order; nothing is measured for stages that are done.

    Args:
        plan: what will be run.
        verbs: the functions of ``robx.api`` behind its stages.
        fresh: every stage will be run again, so that none is done.

    Raises:
        RobxError: the run would refuse the plan or its distillation; the message names the table.
    """
    stages = Stages(plan)
    check_plan(stages, verbs)
    done = set() if fresh else stages.finished(State.open(plan.out / STATE))
    measured = _Measured(plan)
    for entry in plan.tables():
        if entry.number in done:
            yield StageCost(title=_title(entry, plan), cost="done")
        elif entry.stage == "distill":
            with naming_table(entry, verbs):
                yield _distill_cost(entry, plan)
        elif entry.stage == "export":
            yield _export_cost(entry, plan, measured, stages.images_in(plan.data).counts[1])
        elif entry.stage == "eval":
            why = stages.why_no_accuracy(entry)
            cost = f"left out: {why}" if why else _eval_cost(plan, measured, sum(stages.images_in(plan.data).counts))
            yield StageCost(title=_title(entry, plan), cost=cost)
        elif entry.stage == "bench":
            yield _bench_cost(entry, plan)
        else:
            yield StageCost(title=_title(entry, plan), cost="seconds")


def _title(entry: Entry, plan: Plan) -> str:
    return {
        "distill": f"distil {plan.student}",
        "export": f"export to {entry.table.get('format')} {precision_of(entry.table)}",
        "eval": "evaluate",
        "bench": f"bench on {entry.table.get('device', 'local')}",
        "report": "report",
    }[entry.stage]


def _settings(plan: Plan) -> DistillSettings:
    return DistillSettings.of(teacher=plan.teacher, student=plan.student, data=plan.data, **plan.distill)


@dataclass(frozen=True)
class _Measured:
    """What is measured at most once, and only if a stage needs it."""

    plan: Plan

    @functools.cached_property
    def forward(self) -> float:
        """Seconds that the student takes for one image on this machine."""
        return _forward_seconds(self.plan.student, resolve_recipe(_settings(self.plan)))


def _distill_cost(entry: Entry, plan: Plan) -> StageCost:
    _, run = estimate(_settings(plan))
    speed = f"{run.bound_images_per_s:.0f} images/s on {run.device}"
    return StageCost(
        title=_title(entry, plan),
        cost=f"about {duration(3600 * run.hours)} on one process ({counted(run.steps, 'step')}, at most {speed})",
    )


def _eval_cost(plan: Plan, measured: _Measured, images: int) -> str:
    models = 1 + len(plan.export)
    seconds = models * images * measured.forward
    return f"about {duration(seconds)} ({counted(models, 'model')} x {counted(images, 'image')})"


def _export_cost(entry: Entry, plan: Plan, measured: _Measured, test: int) -> StageCost:
    table, name = entry.table, str(entry.table["format"])
    judged = min(int(table.get("judging_images", JUDGING_IMAGES)), test)
    cost = "under a minute"
    if precision_of(table) != "fp32":
        seconds = measured.forward * (judged + SCREENING_IMAGES)
        cost = f"about {duration(seconds)} for each candidate, and its timing"
    if heal := table.get("heal"):
        cost += f", and up to {duration(60 * float(heal))} of healing"
    if budget := table.get("budget"):
        cost += f"; no new candidate after {duration(float(budget))}"
    return StageCost(
        title=_title(entry, plan),
        cost=cost,
        missing=_missing_here(name),
        optional=bool(table.get("optional")),
    )


def _bench_cost(entry: Entry, plan: Plan) -> StageCost:
    table, device = entry.table, str(entry.table.get("device", "local"))
    profile = find_profile(str(table.get("profile", "quick")))
    wanted = wanted_formats(table)
    exports = [one for one in plan.export if wanted is None or one["format"] in wanted]
    processes = int(table.get("processes") or profile.processes)
    seconds = len(exports) * (profile.seconds + processes * profile.warm_up_seconds)
    missing = "" if device == "local" else _missing_there(device, table, {str(one["format"]) for one in exports})
    return StageCost(
        title=_title(entry, plan),
        cost=f"at least {duration(seconds)} ({counted(len(exports), 'bundle')}, profile {profile.name})",
        missing=missing,
        optional=bool(table.get("optional")),
    )


def _missing_here(name: str) -> str:
    """How to install what converts to a format and runs it on this machine; empty if it is installed."""
    row = FORMATS[name]
    packages = [package for runtime in row.runtimes for package in RUNTIMES[runtime].packages]
    if row.extra is None or any(_installed(package) for package in packages):
        return ""
    return f"pip install 'robx[{row.extra}]'"


def _missing_there(device: str, table: Table, formats: set[str]) -> str:
    """What a device lacks for these formats, or why it cannot be reached."""
    try:
        _, findings = examine(device, runner=table.get("runner"), python=table.get("python"))
    except RobxError as error:
        return str(error)
    have = {finding.name for finding in findings if finding.version is not None}
    lacks = []
    for name in sorted(formats):
        rows = [RUNTIMES[runtime] for runtime in FORMATS[name].runtimes]
        if not any(package in have for row in rows for package in row.packages):
            lacks.append(f"{name} needs {rows[0].packages[0]} there: {rows[0].device_install}")
    return "; ".join(lacks)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@torch.inference_mode()
def _forward_seconds(student: str, recipe: Recipe) -> float:
    """Seconds that the student takes for one image on this machine, in batches of 8, with random weights."""
    trunk = build_trunk(student, image_size=recipe.crop_shape).eval()
    pixels = torch.zeros(8, 3, *recipe.crop_shape)
    trunk(pixels)
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < _FORWARD_SECONDS:
        trunk(pixels)
        count += 1
    return (time.perf_counter() - began) / (8 * count)
