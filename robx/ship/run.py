"""run_plan(plan, verbs): every stage in order, each resumed, and skipped when nothing that it depends on has changed.

``ship.json`` in the output folder records what is done: for each stage the hash of its arguments and of what it reads
(images, the student, bundles), and its result. A stage that fails does not stop the others, unless they need it; a full
disk stops them all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robx.arguments import checked
from robx.errors import Interrupted, NoSpace, RobxError, counted, duration, is_full
from robx.export.gate.gate import gate_error
from robx.progress import Progress
from robx.records import Latency
from robx.runtime.bench.validity import is_refused
from robx.ship.checks import check_plan, in_plan, naming_table
from robx.ship.command_line import command_line, has_option
from robx.ship.plan import PLAN, Entry, Plan, Verbs
from robx.ship.stages import RECIPE, Stage, Stages, State, bundle_result, student_result
from robx.store.files import write_text
from robx.store.locks import lock_folder
from robx.store.toml import toml_value
from robx.store.written import Written

STATE = "ship.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """What a plan made. The folders are inside the plan's output folder."""

    student: Path
    bundles: tuple[Path, ...]
    report: Path | None  # the page, with report.md and report.json beside it; None: the plan has no report
    refused: tuple[str, ...] = ()  # exports that the gate refused, and INVALID latencies, one line each
    failed: tuple[str, ...] = ()  # stages that failed, one line each
    skipped: tuple[str, ...] = ()  # optional stages that failed

    @checked
    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with paths as strings."""
        return {
            "student": str(self.student),
            "bundles": [str(one) for one in self.bundles],
            "report": None if self.report is None else str(self.report),
        } | {name: list(getattr(self, name)) for name in ("refused", "failed", "skipped")}


def run_plan(plan: Plan, verbs: Verbs, *, fresh: bool = False, progress: Progress, announce: Say, say: Say) -> Shipped:
    """Run the stages of `plan` that are not done, and write the report.

    Args:
        plan: what to run.
        verbs: the functions of ``robx.api`` that run the stages, by their names in the plan.
        fresh: run every stage again, distillation from its first step.
        progress: called with (done, total, note) during each stage.
        announce: called with a line when a stage starts and when it ends.
        say: called with a line about a stage that is left out, is skipped or fails.

    Raises:
        InputError: the plan has a wrong key or value, or its images cannot be used; nothing is written then.
        Interrupted: a signal stopped a stage; the same plan continues.
        NoSpace: the disk is full, in whichever stage; the same plan continues.
        RobxError: distillation or the report failed.
    """
    stages = Stages(plan)
    check_plan(stages, verbs)
    with lock_folder(plan.out):
        written = Written(plan.out)
        written.claim(PLAN, STATE, RECIPE)
        write_text(plan.out / PLAN, plan.to_toml())
        state = State.open(plan.out / STATE)
        ship = _Ship(stages, verbs, state, fresh=fresh, progress=progress, announce=announce, say=say)
        for entry in plan.tables():
            ship.run(entry)
    return Shipped(
        student=stages.student,
        bundles=tuple(ship.bundles),
        report=ship.page,
        refused=tuple(ship.refused),
        failed=tuple(ship.failed),
        skipped=tuple(ship.skipped),
    )


class _Ship:
    """One run of a plan, stage by stage, and its results."""

    def __init__(
        self, stages: Stages, verbs: Verbs, state: State, *, fresh: bool, progress: Progress, announce: Say, say: Say
    ) -> None:
        self._stages, self._verbs, self._state, self._fresh = stages, verbs, state, fresh
        self._progress, self._announce, self._say = progress, announce, say
        self._total, self._file = len(stages.plan.tables()), stages.plan.out / PLAN
        self.bundles: list[Path] = []
        self.page: Path | None = None
        self.refused: list[str] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def run(self, entry: Entry) -> None:
        """Run one stage. A failure of the distillation or the report ends the plan; the others may fail."""
        needed = entry.stage in ("distill", "report")
        with (
            contextlib.nullcontext() if needed else self._may_fail(entry),
            naming_table(entry, self._verbs, file=self._file),
        ):
            {
                "distill": self._distill,
                "export": self._export,
                "eval": self._evaluate,
                "bench": self._bench,
                "report": self._report,
            }[entry.stage](entry)

    def _distill(self, entry: Entry) -> None:
        stage = self._stages.distill(entry)
        if text := self._stages.recipe_text:
            write_text(self._stages.plan.out / RECIPE, text)
        self._call(stage, record=lambda made: student_result(made.path))

    def _export(self, entry: Entry) -> None:
        def record(made: Any) -> dict[str, Any]:
            limits = {"most": entry.table.get("candidates"), "budget": entry.table.get("budget")}
            error = gate_error(made.record, made.path, **limits)
            refused = None if error is None else in_plan(str(error), entry, self._verbs, file=self._file)
            return bundle_result(made.path) | {"refused": refused}

        result = self._call(self._stages.export(entry), record=record)
        if result["refused"]:
            self.refused.append(result["refused"])
        # A refused int8 ships as a float model, which another export may have written already.
        if (folder := Path(result["folder"])) not in self.bundles:
            self.bundles.append(folder)

    def _evaluate(self, entry: Entry) -> None:
        if why := self._stages.why_no_accuracy(entry):
            self._leave_out(entry, "Evaluate", why)
            return
        stage = self._stages.evaluate(entry, self.bundles)
        if entry.table.get("fidelity") and "fidelity" not in stage.arguments:
            self._leave_out(entry, "Compare the exports with the student", "this machine can run none of them")
        where = f"{self._stages.student} and its bundles"
        self._call(stage, record=lambda made: {"said": f"{counted(len(made), 'record')} in {where}"})

    def _bench(self, entry: Entry) -> None:
        device = entry.table.get("device", "local")
        stage = self._stages.bench(entry, self.bundles)
        if not stage.measured:
            self._leave_out(entry, f"Measure latency on {device}", "none of the bundles is for it")
            return

        def record(made: list[Latency]) -> dict[str, Any]:
            pairs = list(zip(stage.measured, made, strict=True))
            wrong = [
                f"{p} on {device}: {'; '.join(one.reasons)}" for p, one in pairs if is_refused(one.verdict, one.reasons)
            ]
            return {"refused": wrong, "said": "; ".join(_latency(*pair) for pair in pairs)}

        self.refused += self._call(stage, record=record)["refused"]

    def _report(self, entry: Entry) -> None:
        stage = self._stages.report(entry)
        self._start(stage, stage.arguments)
        self._verbs["report"](**stage.arguments)
        self.page = stage.arguments["out"]

    def _call(self, stage: Stage, *, record: Callable[[Any], Any]) -> Any:
        """Run a stage, or return its earlier result if its inputs are the same and its output still exists."""
        verb = stage.entry.stage
        arguments = stage.arguments | ({"fresh": True} if self._fresh and verb == "distill" else {})
        self._start(stage, arguments)
        earlier = None if self._fresh else self._stages.earlier(stage, self._state)
        if earlier is not None:
            self._announce(f"  {earlier['said']} (done earlier, with the same inputs)")
            return earlier
        inputs = self._stages.hash(stage)
        began = time.monotonic()
        prefix = f"[{stage.entry.number}/{self._total}] "
        made = self._verbs[verb](
            **arguments, progress=lambda done, total, note: self._progress(done, total, prefix + note)
        )
        result = record(made)
        self._state.add(stage.key, inputs, result)
        self._announce(f"  {result['said']} ({duration(time.monotonic() - began)})")
        return result

    def _leave_out(self, entry: Entry, title: str, why: str) -> None:
        self._say(f"[{entry.number}/{self._total}] {title}: left out, as {why}")

    def _start(self, stage: Stage, arguments: dict[str, Any]) -> None:
        self._announce(f"[{stage.entry.number}/{self._total}] {stage.title}")
        verb = stage.entry.stage
        self._announce(f"  $ {command_line(verb, arguments)}")
        others = [(name, value) for name, value in arguments.items() if not has_option(verb, name, value)]
        if others:
            said = ", ".join(f"{name} = {toml_value(value)}" for name, value in others)
            self._announce(f"  with {said}, for which the command has no option")

    @contextlib.contextmanager
    def _may_fail(self, entry: Entry) -> Iterator[None]:
        """Note a stage's failure and go on; a signal or a full disk ends the plan."""
        optional = entry.table.get("optional")
        try:
            yield
        except Interrupted:
            raise
        except RobxError as error:
            if is_full(error):
                raise NoSpace(str(error)) from None
            (self.skipped if optional else self.failed).append(str(error))
            self._say(f"  {'skipped' if optional else 'FAILED'}: {error}")


def _latency(folder: Path, record: Latency) -> str:
    p50 = record.values.get("p50")
    why = f" ({'; '.join(record.reasons)})" if record.reasons else ""
    return f"{folder.name} {'' if p50 is None else f'p50 {p50.value:.2f} ms, '}{record.verdict}{why}"
