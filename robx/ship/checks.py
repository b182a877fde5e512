"""Every reason to refuse a plan, checked before its first stage starts, in a dry run and in a real one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from robx.distill.resolve import DistillSettings, resolve_recipe
from robx.errors import ArtifactError, InputError, Interrupted, RobxError
from robx.eval.datasets.splits import open_split
from robx.eval.evaluate import EvalSettings
from robx.eval.protocols.lowshot import check_splits, parse_shots
from robx.eval.report.render import check_report
from robx.export.build import ExportSettings, require_places
from robx.export.image_splits import open_data, require_images
from robx.runtime.bench.profiles import BenchSettings
from robx.runtime.bench.runners import python_command
from robx.runtime.session import check_provider
from robx.ship.command_line import option_keys
from robx.ship.plan import Entry, Plan, Verbs, check_keys, table_types
from robx.ship.stages import Stages, wanted_formats
from robx.store.folders import require_writable

_TOP = ("teacher", "student", "data", "out")  # keys at the top of a plan


def check_plan(stages: Stages, verbs: Verbs) -> None:
    """Refuse a plan that cannot be carried out. Images are listed, and nothing is written.

    Raises:
        RobxError: the message names the table; the first one that is wrong counts.
    """
    plan = stages.plan
    check_keys(plan, verbs)
    _check_out(plan)
    exports: list[tuple[Entry, ExportSettings]] = []
    for entry in plan.tables():
        with naming_table(entry, verbs):
            if entry.stage == "distill":
                resolve_recipe(DistillSettings.of(**stages.distill_start, **plan.distill))
            elif entry.stage == "export":
                exports.append((entry, _check_export(stages, entry)))
            elif entry.stage == "eval":
                _check_eval(stages, entry)
            elif entry.stage == "bench":
                _check_bench(stages, entry)
            else:
                arguments = stages.report(entry).arguments
                check_report(arguments["out"], margin=arguments["margin"], budgets=arguments.get("budgets", ()))
    _check_folders(exports)


@contextlib.contextmanager
def naming_table(entry: Entry, verbs: Verbs, *, file: Path | None = None) -> Iterator[None]:
    """Add to an error its table, and what the options that it names are called in a plan; see `in_plan`."""
    try:
        yield
    except Interrupted:
        raise
    except RobxError as error:
        again = isinstance(error, ArtifactError) and "--fresh" not in str(error)
        message = f"{error} (robx ship --fresh runs every stage again)" if again else str(error)
        error.args = (in_plan(message, entry, verbs, file=file),)
        raise


def in_plan(message: str, entry: Entry, verbs: Verbs, *, file: Path | None = None) -> str:
    """A message about a stage: after its table, and followed by where each option that it names goes in a plan.

    `file` is the plan's file, once it is written: a plan that was made from options is nowhere else.
    """
    keys, known = option_keys(entry.stage), table_types(entry.stage, verbs[entry.stage])
    notes = []
    for option in dict.fromkeys(re.findall(r"(?<!robx ship )--[a-z][a-z0-9-]*[a-z0-9]", message)):
        key = keys.get(option, "")
        if key in known:
            line = f"{key} = true" if known[key] is bool else f"the key {key}"
            notes.append(f"{option} is {line} {'in' if known[key] is bool else 'of'} this table")
        elif key in _TOP:
            notes.append(f"{option} is the key {key} at the top of the plan")
        elif option == "--fresh":
            notes.append("--fresh is robx ship --fresh, which runs every stage again")
    if file is not None and any(note.endswith(("this table", "the plan")) for note in notes):
        notes.append(f"the plan that was run is {file}")
    return f"{entry.label}: {message}" + (f" ({'; '.join(notes)})" if notes else "")


def _check_out(plan: Plan) -> None:
    """Refuse an output folder that cannot be made, or that is the folder of the images."""
    if plan.out.resolve() == plan.data.resolve():
        raise InputError(f"out: {plan.out} is the folder of the images: give another one")
    try:
        require_writable(plan.out, remedy="give a folder elsewhere")
    except InputError as error:
        error.args = (f"out: {error}",)
        raise


def _check_export(stages: Stages, entry: Entry) -> ExportSettings:
    settings = ExportSettings.of(**stages.export_arguments(entry))
    plan = stages.plan
    if settings.out is not None:
        taken = {plan.out: "the plan's own folder", stages.student: "the student's", plan.data: "that of the images"}
        for place, what in taken.items():
            if settings.out.resolve() == place.resolve():
                raise InputError(f"out: {settings.out} is {what}: give another folder for the bundle")
    if entry.table.get("optional"):
        return settings  # it may fail for what this machine or the images lack
    if settings.out is not None:  # else it is inside the plan's own folder
        require_places(settings)
    if settings.data is not None:
        train, held_out = open_data(
            settings.data, settings.test, labels=settings.labels, image_member=settings.image_member
        )
        require_images(train, held_out, settings.sizes)
    return settings


def _check_eval(stages: Stages, entry: Entry) -> None:
    s = EvalSettings.of(**stages.eval_arguments(entry, [stages.student]))
    check_provider(s.device)
    if stages.why_no_accuracy(entry) or not s.splits or s.data is None:
        return
    split = open_split(s.data, s.test, labels=s.labels, image_member=s.image_member)
    for shot in parse_shots(s.lowshot) if s.lowshot else ():
        check_splits(split.bank, shot, s.lowshot_splits)


def _check_bench(stages: Stages, entry: Entry) -> None:
    settings = BenchSettings.of(**stages.bench_arguments(entry, [stages.student]))
    python_command(settings.python)
    made = [str(table["format"]) for table in stages.plan.export]
    for name in wanted_formats(entry.table) or ():
        if name not in made:
            raise InputError(
                f"formats: there is no [[export]] with format {name}: give {', '.join(dict.fromkeys(made))}"
            )


def _check_folders(exports: list[tuple[Entry, ExportSettings]]) -> None:
    """Refuse two exports to one folder, of which the later would replace the earlier."""
    for place, (entry, settings) in enumerate(exports):
        for other, before in exports[:place]:
            if shared := _shared_folder(before, settings):
                raise InputError(
                    f"{other.label} and {entry.label} would both write to {shared}: give one of them another folder "
                    "with out"
                )


def _shared_folder(one: ExportSettings, two: ExportSettings) -> Path | None:
    """The folder that both exports write to: for the model asked for, or for the one that ships if the gate refuses."""
    if one.requested_folder.resolve() == two.requested_folder.resolve():
        return two.requested_folder
    if one.same_float_model(two):  # a refused int8 ships as the model that the other one makes too
        return None
    folders = {folder.resolve(): folder for folder in one.possible_folders}
    return next((folder for folder in two.possible_folders if folder.resolve() in folders), None)
