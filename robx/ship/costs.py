"""What a plan will cost and what it lacks, before hours are spent: ``robx ship --dry-run``.

Measured here for a moment: the training step and one forward pass of the student. Counted: images, models, processes.
Nothing is written or downloaded.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from robx.distill.recipes import Recipe
from robx.distill.resolve import DistillSettings
from robx.distill.train import estimate
from robx.errors import RobxError, counted, duration
from robx.export.image_splits import JUDGING_IMAGES, SCREENING_IMAGES
from robx.formats import FORMATS, RUNTIMES
from robx.runtime.bench.profiles import find_profile
from robx.runtime.doctor import examine
from robx.ship.inputs import Images
from robx.ship.plan import Plan, Table, Verbs, check_keys
from robx.trunk import build_trunk

_FORWARD_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage of a plan."""

    title: str
    cost: str
    missing: str = ""  # what to install or connect before it can run
    optional: bool = False


def estimate_plan(plan: Plan, verbs: Verbs) -> Iterator[StageCost]:
    """The cost of each stage, in their order; each is computed when it is asked for.

    Raises:
        RobxError: what the plan or its distillation would be refused for.
    """
    check_keys(plan, verbs)
    settings = DistillSettings.of(teacher=plan.teacher, student=plan.student, data=plan.data, **plan.distill)
    recipe, run = estimate(settings)
    speed = f"{run.bound_images_per_s:.0f} images/s on {run.device}"
    yield StageCost(
        title=f"distil {plan.student}",
        cost=f"about {duration(3600 * run.hours)} on one process ({counted(run.steps, 'step')}, at most {speed})",
    )
    forward = _forward_seconds(plan.student, recipe)
    data = Images.open(plan.data)
    train, test = data.counts
    for table in plan.export:
        yield _export_cost(table, forward, test)
    models = 1 + len(plan.export)
    images = train + test
    yield StageCost(
        title="evaluate",
        cost=f"about {duration(models * images * forward)} ({counted(models, 'model')} x {counted(images, 'image')})"
        if data.labelled
        else f"nothing: {plan.data} has no class labels, so the report will have no accuracy",
    )
    for table in plan.bench:
        yield _bench_cost(table, plan)
    yield StageCost(title="report", cost="seconds")


def _export_cost(table: Table, forward: float, test: int) -> StageCost:
    name = str(table["format"])
    precision = "int8" if table.get("int8") else "fp16" if table.get("fp16") else "fp32"
    judged = min(int(table.get("judging_images", JUDGING_IMAGES)), test)
    seconds = forward * (judged + SCREENING_IMAGES)
    cost = "under a minute" if precision == "fp32" else f"about {duration(seconds)} for each candidate, and its timing"
    if heal := table.get("heal"):
        cost += f", and up to {duration(60 * float(heal))} of healing"
    if budget := table.get("budget"):
        cost += f"; no new candidate after {duration(float(budget))}"
    return StageCost(
        title=f"export to {name} {precision}",
        cost=cost,
        missing=_missing_here(name) if name in FORMATS else f"there is no format {name!r}",
        optional=bool(table.get("optional")),
    )


def _bench_cost(table: Table, plan: Plan) -> StageCost:
    device = str(table.get("device", "local"))
    profile = find_profile(str(table.get("profile", "quick")))
    wanted = table.get("formats")
    exports = [one for one in plan.export if wanted is None or one["format"] in wanted]
    processes = int(table.get("processes") or profile.processes)
    seconds = len(exports) * (profile.seconds + processes * profile.warm_up_seconds)
    missing = "" if device == "local" else _missing_there(device, table, {str(one["format"]) for one in exports})
    return StageCost(
        title=f"bench on {device}",
        cost=f"at least {duration(seconds)} ({counted(len(exports), 'bundle')}, profile {profile.name})",
        missing=missing,
        optional=bool(table.get("optional")),
    )


def _missing_here(name: str) -> str:
    """How to install what converts to a format and runs it on this machine; empty if it is there."""
    row = FORMATS[name]
    packages = [package for runtime in row.runtimes for package in RUNTIMES[runtime].packages]
    if row.extra is None or any(_installed(package) for package in packages):
        return ""
    return f"pip install 'robx[{row.extra}]'"


def _missing_there(device: str, table: Table, formats: set[str]) -> str:
    """What a device lacks for these formats, or why it cannot be reached."""
    try:
        _, findings = examine(device, python=table.get("python"))
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
