"""`robx ship`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robx.console import announce, print_line, print_table, progress_bar, quiet_option, say
from robx.errors import GateFailed, InputError, RobxError, counted
from robx.formats import FORMATS
from robx.options import Command, Number, PathType, WholeNumber
from robx.store.files import read_json

if TYPE_CHECKING:
    from robx.ship.plan import Plan
    from robx.ship.run import Shipped

_PATH = PathType()


@click.command(cls=Command)
@click.argument("plan", required=False, type=_PATH)
@click.option("--teacher", metavar="NAME", help="A name from `robx teachers`, or timm:NAME.")
@click.option("--student", metavar="NAME", help="A name from `robx students`, or any timm model.")
@click.option("--data", type=_PATH, help="Images, with labels in train/CLASS/ and test/CLASS/ for the accuracy.")
@click.option("--out", type=_PATH, help="Output folder; finished stages in it are reused.")
@click.option("--epochs", type=WholeNumber(1), help="Passes over the images.")
@click.option("--format", "formats", type=click.Choice(list(FORMATS)), multiple=True, help="Format; may be repeated.")
@click.option("--int8", is_flag=True, help="Also export to int8, behind the accuracy and speed gate.")
@click.option(
    "--device", "devices", multiple=True, help="local, ssh://[user@]host[:port] or adb://serial; may be repeated."
)
@click.option("--budget-ms", "budgets", type=Number(0, min_open=True), multiple=True, help="p90 latency budget.")
@click.option("--margin", type=Number(0), help="Points of accuracy that a faster model may lose. [default: 1]")
@click.option("--fresh", is_flag=True, help="Run every stage again, distillation from its first step.")
@click.option("--dry-run", is_flag=True, help="Say what each stage will cost and what is missing; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def ship(
    plan: Path | None,
    formats: tuple[str, ...],
    int8: bool,
    devices: tuple[str, ...],
    budgets: tuple[float, ...],
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Distil, export, evaluate, measure and report in one command.

    PLAN is a TOML file; the options say the same for simple cases, or replace its values. Every stage resumes where it
    was interrupted, and is skipped when nothing that it depends on has changed. The exit status is that of the worst
    gate: 3 if an export was refused or a latency is INVALID. It is 2 if a stage failed, and 1 if the disk is full.

    \b
    robx ship --teacher dino_vits16 --student resnet18 --data images/ --out runs/r18 \\
        --format onnx --format openvino --int8 --device ssh://pi@raspberrypi --budget-ms 30
    robx ship runs/r18/plan.toml --dry-run

    The plan that was run is written to OUT/plan.toml.
    """
    from robx.ship.plan import make_plan, read_plan

    listed = {"--format": formats, "--int8": int8, "--device": devices, "--budget-ms": budgets}
    epochs = given.pop("epochs")
    if plan is None:
        values = _from_options(formats, int8, devices, budgets) | {k: v for k, v in given.items() if v is not None}
        if epochs is not None:
            values["distill"] = {"epochs": epochs}
        chosen = make_plan(values, where="robx ship")
    else:
        if used := [name for name, value in listed.items() if value]:
            raise InputError(f"{', '.join(used)}: {plan} lists exports, devices and budgets: edit it, or leave it out")
        chosen = read_plan(plan, **given)
        if given["margin"] is not None and (own := chosen.own_margins):
            raise InputError(f"--margin: {', '.join(own)} of {plan} has its own: edit that, or leave --margin out")
        if epochs is not None:
            chosen = chosen.with_distill(epochs=epochs)
    if dry_run:
        _show_costs(chosen, fresh=fresh, as_json=as_json)
        return
    shipped = run_and_show(chosen, fresh=fresh, as_json=as_json)
    raise_worst(shipped)


def run_and_show(plan: Plan, *, fresh: bool = False, as_json: bool = False) -> Shipped:
    """Run a plan with progress on standard error, and print its models as a table."""
    from robx.api import VERBS
    from robx.ship.run import run_plan

    with progress_bar(quiet=as_json) as progress:
        shipped = run_plan(plan, VERBS, fresh=fresh, progress=progress, announce=announce, say=say)
    if as_json:
        click.echo(json.dumps(shipped.to_dict(), indent=2))
    elif shipped.report is not None:
        _show(shipped.report.with_suffix(".json"))
        print_line(f"Report: {shipped.report} (with report.md and report.json beside it)")
    return shipped


def raise_worst(shipped: Shipped) -> None:
    """Raise the error of the worst stage: one that failed, else one that a gate refused.

    Raises:
        RobxError: a stage failed; exit status 2.
        GateFailed: a gate refused; exit status 3.
    """
    for lines, kind in ((shipped.failed, RobxError), (shipped.refused, GateFailed)):
        if lines:
            others = f" (and {counted(len(lines) - 1, 'other stage')})" if len(lines) > 1 else ""
            raise kind(f"{lines[0]}{others}")


def _from_options(
    formats: tuple[str, ...], int8: bool, devices: tuple[str, ...], budgets: tuple[float, ...]
) -> dict[str, Any]:
    if not formats:
        raise InputError("nothing to export: give --format NAME, or a PLAN")
    exports = [{"format": name, **more} for name in formats for more in ({}, {"int8": True})[: 1 + int8]]
    values: dict[str, Any] = {"export": exports}
    if devices:
        values["bench"] = [{"device": device} for device in devices]
    if budgets:
        values["report"] = {"budgets": list(budgets)}
    return values


def _show_costs(plan: Plan, *, fresh: bool, as_json: bool) -> None:
    from robx.api import VERBS
    from robx.records import to_json
    from robx.ship.costs import estimate_plan

    with progress_bar(quiet=as_json) as progress:
        found = []
        for cost in estimate_plan(plan, VERBS, fresh=fresh):
            found.append(cost)
            progress(len(found), len(plan.tables()), f"estimating: {cost.title}")
    if as_json:
        click.echo(json.dumps([to_json(cost) for cost in found], indent=2))
    else:
        print_table(("stage", "cost on this machine", "missing"), [(c.title, c.cost, c.missing) for c in found])
    if lacking := [cost for cost in found if cost.missing and not cost.optional]:
        raise RobxError(f"{lacking[0].title}: {lacking[0].missing}")


def _show(path: Path) -> None:
    """Print size, accuracy and latency of every model in the report."""
    page = read_json(path)
    headings = ("model", "MB", "kNN %", "drop against fp32, points", "p50 ms", "p90 bound", "validity")
    rows = []
    for row in page["rows"]:
        latency = row["latency"] or {}
        rows.append(
            (
                f"{row['name']} {row['format']} {row['precision']}",
                f"{row['bytes'] / 1e6:.1f}",
                _figure(row["accuracy"].get("knn"), ".1f"),
                f"{_figure(row['drop'], '.2f')} {row['judged'] or ''}",
                _figure(latency.get("p50"), ".2f"),
                _figure(latency.get("p90"), ".2f", bound="high"),
                row["validity"] or "not measured",
            )
        )
    print_table(headings, rows, title=page["title"], right=(1, 2, 3, 4, 5))


def _figure(figure: Any, form: str, *, bound: str = "value") -> str:
    number = figure["value"][bound] if figure else None
    return "" if number is None else format(number, form)
