"""run_plan(plan, verbs): every stage in order, each resumed, and skipped when nothing that it depends on has changed.

What is done stands in ``ship.json`` in the output folder: for each stage the hash of its arguments and of what it reads
(images, the student, bundles), and its result. A stage that fails does not stop the others, unless they need it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robx.distill.presets import NAMED
from robx.distill.recipe_toml import read_recipe
from robx.errors import Interrupted, RobxError, counted, duration
from robx.export.gate.gate import gate_error
from robx.formats import RUNTIMES
from robx.progress import Progress
from robx.records import Bundle, Latency, load_bundle, load_student
from robx.runtime.bench.validity import is_refused
from robx.ship.command_line import command_line, option_names
from robx.ship.inputs import Images
from robx.ship.plan import PLAN, Plan, Table, Verbs, check_keys
from robx.store.files import read_json, sha256_bytes, sha256_file, write_json, write_text
from robx.store.locks import lock_folder
from robx.store.toml import toml_value
from robx.store.written import Written

STATE = "ship.json"
RECIPE = "recipe.toml"  # keys of the recipe in the plan's [distill]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """What a plan made. The folders are inside the plan's output folder."""

    student: Path
    bundles: tuple[Path, ...]
    report: Path  # the page; report.md and report.json are beside it
    refused: tuple[str, ...] = ()  # exports that the gate refused, and INVALID latencies, one line each
    failed: tuple[str, ...] = ()  # stages that failed, one line each
    skipped: tuple[str, ...] = ()  # optional stages that failed

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with paths as strings."""
        return {
            "student": str(self.student),
            "bundles": [str(one) for one in self.bundles],
            "report": str(self.report),
        } | {name: list(getattr(self, name)) for name in ("refused", "failed", "skipped")}


def run_plan(plan: Plan, verbs: Verbs, *, fresh: bool = False, progress: Progress, announce: Say, say: Say) -> Shipped:
    """Run the stages of `plan` that are not done, and write the report.

    Args:
        plan: what to run.
        verbs: the functions of ``robx.api`` that run the stages, by their names in the plan.
        fresh: run every stage again, distillation from its first step.
        progress: called with (done, total, note) during each stage.
        announce: called with a line when a stage starts and ends.
        say: called with a line about a stage that was left out, was skipped or failed.

    Raises:
        InputError: the plan has a wrong key, or its images cannot be used.
        Interrupted: a signal stopped a stage; the same plan continues.
        RobxError: distillation or the report failed.
    """
    check_keys(plan, verbs)
    with lock_folder(plan.out):
        written = Written(plan.out)
        written.claim(PLAN, STATE, RECIPE)
        write_text(plan.out / PLAN, plan.to_toml())
        ship = _Ship(
            plan, verbs, State.open(plan.out / STATE), fresh=fresh, progress=progress, announce=announce, say=say
        )
        student = ship.distill()
        for table in plan.export:
            ship.export(student, table)
        # A refused int8 ships as the float model, whose folder another export may have written.
        bundles = list(dict.fromkeys(ship.bundles))
        ship.evaluate(student, bundles)
        for table in plan.bench:
            ship.bench(bundles, table)
        page = ship.report()
    return Shipped(
        student=student,
        bundles=tuple(bundles),
        report=page,
        refused=tuple(ship.refused),
        failed=tuple(ship.failed),
        skipped=tuple(ship.skipped),
    )


@dataclass
class State:
    """The stages that are done, by their key: {"inputs": hash, "result": what the stage returned}."""

    path: Path
    done: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> State:
        """Read the file; a missing or damaged one means that nothing is done, which costs time and loses nothing."""
        with contextlib.suppress(RobxError):
            found = read_json(path) if path.is_file() else {}
            return cls(path, found if isinstance(found, dict) else {})
        return cls(path)

    def result(self, key: str, inputs: str) -> Any:
        """What the stage returned when it ran with the same inputs; None otherwise."""
        entry = self.done.get(key)
        return entry.get("result") if isinstance(entry, dict) and entry.get("inputs") == inputs else None

    def add(self, key: str, inputs: str, result: Any) -> None:
        """Record a stage as done."""
        self.done[key] = {"inputs": inputs, "result": result}
        write_json(self.path, self.done)


class _Ship:
    """One run of a plan: its stages, and what came of them."""

    def __init__(
        self, plan: Plan, verbs: Verbs, state: State, *, fresh: bool, progress: Progress, announce: Say, say: Say
    ) -> None:
        self._plan, self._verbs, self._state, self._fresh = plan, verbs, state, fresh
        self._progress, self._announce, self._say = progress, announce, say
        self._number, self._total = 0, len(plan.tables())
        self._images: dict[str, Images] = {}
        self.bundles: list[Path] = []
        self.refused: list[str] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def distill(self) -> Path:
        plan = self._plan
        arguments = {"teacher": plan.teacher, "student": plan.student, "data": plan.data, "out": plan.out / "student"}
        result = self._run(
            f"Distil {plan.student} from {plan.teacher}",
            "distill",
            arguments | self._recipe(),
            inputs=[],
            still=_student_is,
            record=lambda made: _student_state(made.path),
        )
        return Path(result["folder"])

    def _recipe(self) -> dict[str, Any]:
        """The arguments in [distill]; keys that are not options of the command go into a recipe file."""
        options = option_names("distill")
        keys = {key: value for key, value in self._plan.distill.items() if key not in options}
        arguments = {key: value for key, value in self._plan.distill.items() if key in options}
        if not keys:
            return arguments
        path = self._plan.out / RECIPE
        if "recipe" in arguments:
            given = str(arguments["recipe"])
            keys = ({"like": given} if given in NAMED else read_recipe(Path(given))) | keys
        write_text(path, "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items()))
        return arguments | {"recipe": path}

    def export(self, student: Path, table: Table) -> None:
        precision = "int8" if table.get("int8") else "fp16" if table.get("fp16") else "fp32"
        margin = self._plan.with_margin("export") if precision != "fp32" else {}
        arguments = {"student": student, "format": table["format"], "data": self._plan.data, **margin}
        arguments |= _arguments(table)

        def record(made: Any) -> dict[str, Any]:
            bundle: Bundle = made.record
            limits = {"most": table.get("candidates"), "budget": table.get("budget")}
            error = gate_error(bundle, made.path, **limits)
            return _bundle_state(made.path) | {"refused": None if error is None else str(error)}

        with self._may_fail(table):
            result = self._run(
                f"Export to {table['format']} {precision}",
                "export",
                arguments,
                inputs=[load_student(student).sha256],
                still=_bundle_is,
                record=record,
            )
            if result["refused"]:
                self.refused.append(result["refused"])
            self.bundles.append(Path(result["folder"]))

    def evaluate(self, student: Path, bundles: list[Path]) -> None:
        table = self._plan.eval
        if not ({"test", "labels"} & set(table) or self._images_in(self._plan.data).labelled):
            self._leave_out("Evaluate", f"{self._plan.data} has no class labels, so the report will have no accuracy")
            return
        models = [student, *filter(_runs_here, bundles)]
        arguments = {"models": models, "data": self._plan.data, **self._plan.with_margin("eval"), **_arguments(table)}
        inputs = [load_student(student).sha256, *(load_bundle(folder).id for folder in models[1:])]
        with self._may_fail(table):
            self._run(
                "Evaluate the student and its exports",
                "eval",
                arguments,
                inputs=inputs,
                still=lambda _: all((folder / "measurements.jsonl").is_file() for folder in models),
                record=lambda made: {"said": f"{counted(len(made), 'record')} in {student} and its bundles"},
            )

    def bench(self, bundles: list[Path], table: Table) -> None:
        device = table.get("device", "local")
        chosen = _on_device(bundles, table)
        if not chosen:
            self._leave_out(f"Measure latency on {device}", "none of the bundles is for it")
            return
        arguments = {"bundles": chosen, "data": self._plan.data, **_arguments(table)}

        def record(made: list[Latency]) -> dict[str, Any]:
            pairs = list(zip(chosen, made, strict=True))
            wrong = [
                f"{p} on {device}: {'; '.join(one.reasons)}" for p, one in pairs if is_refused(one.verdict, one.reasons)
            ]
            return {"refused": wrong, "said": "; ".join(_latency(*pair) for pair in pairs)}

        with self._may_fail(table):
            result = self._run(
                f"Measure latency on {'this machine' if device == 'local' else device}",
                "bench",
                arguments,
                inputs=[load_bundle(folder).id for folder in chosen],
                still=lambda _: all((folder / "measurements.jsonl").is_file() for folder in chosen),
                record=record,
            )
            self.refused += result["refused"]

    def report(self) -> Path:
        page = self._plan.out / "report.html"
        arguments = {"folders": [self._plan.out], **self._plan.with_margin("report"), **self._plan.report, "out": page}
        self._start("Write the report", "report", arguments)
        self._verbs["report"](**arguments)
        return page

    def _run(
        self,
        title: str,
        verb: str,
        arguments: dict[str, Any],
        *,
        inputs: list[str],
        record: Callable[[Any], Any],
        still: Callable[[Any], bool] = lambda result: True,
    ) -> Any:
        """Run a stage, or return its earlier result where its inputs are the same and `still` says that it exists."""
        again = {"fresh": True} if self._fresh and verb == "distill" else {}
        self._start(title, verb, {**arguments, **again})
        key = f"{self._number} {title}"
        state = self._hash(verb, arguments, inputs)
        earlier = None if self._fresh else self._state.result(key, state)
        if earlier is not None and still(earlier):
            self._announce(f"  {earlier['said']} (done earlier, with the same inputs)")
            return earlier
        began = time.monotonic()
        prefix = f"[{self._number}/{self._total}] "
        made = self._verbs[verb](
            **arguments, **again, progress=lambda done, total, note: self._progress(done, total, prefix + note)
        )
        result = record(made)
        self._state.add(key, state, result)
        self._announce(f"  {result['said']} ({duration(time.monotonic() - began)})")
        return result

    def _leave_out(self, title: str, why: str) -> None:
        self._number += 1
        self._say(f"[{self._number}/{self._total}] {title}: left out, as {why}")

    def _start(self, title: str, verb: str, arguments: Table) -> None:
        self._number += 1
        self._announce(f"[{self._number}/{self._total}] {title}")
        self._announce(f"  $ {command_line(verb, arguments)}")

    @contextlib.contextmanager
    def _may_fail(self, table: Table) -> Iterator[None]:
        """Note a stage's failure and go on; not for a signal."""
        try:
            yield
        except Interrupted:
            raise
        except RobxError as error:
            (self.skipped if table.get("optional") else self.failed).append(str(error))
            self._say(f"  {'skipped' if table.get('optional') else 'FAILED'}: {error}")

    def _hash(self, verb: str, arguments: Table, inputs: list[str]) -> str:
        """Of a stage's arguments, and of the contents of the files and images that they name."""
        contents = {name: self._contents(name, value) for name, value in arguments.items()}
        return sha256_bytes(json.dumps([verb, contents, inputs], sort_keys=True).encode())

    def _images_in(self, data: Path) -> Images:
        """The images of a data set, opened once in a run."""
        if str(data) not in self._images:
            self._images[str(data)] = Images.open(data)
        return self._images[str(data)]

    def _contents(self, name: str, value: Any) -> Any:
        if name in ("data", "test"):
            return [str(value), self._images_in(Path(value)).fingerprint]
        if isinstance(value, str | Path) and Path(value).is_file():
            return [str(value), sha256_file(Path(value))]
        return [str(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _arguments(table: Table) -> dict[str, Any]:
    """The arguments in a stage's table, without the plan's own keys."""
    return {key: value for key, value in table.items() if key not in ("optional", "formats")}


def _on_device(bundles: list[Path], table: Table) -> list[Path]:
    """The bundles to measure on a device: those of the wanted formats or, without any, those that run here."""
    wanted = table.get("formats")
    if wanted is not None:
        names = [wanted] if isinstance(wanted, str) else wanted
        return [folder for folder in bundles if load_bundle(folder).format in names]
    return [folder for folder in bundles if table.get("device", "local") != "local" or _runs_here(folder)]


def _runs_here(folder: Path) -> bool:
    """Whether this machine can open the bundle: TensorRT needs a GPU, Core ML a Mac."""
    bundle = load_bundle(folder)
    if bundle.format == "trt":
        import torch

        return torch.cuda.is_available()
    return RUNTIMES[bundle.runtime].engine is not None


def _student_state(folder: Path) -> dict[str, Any]:
    student = load_student(folder)
    said = f"{folder}: {student.timm_name}, {student.images_seen} images seen"
    return {"folder": str(folder), "id": student.sha256, "said": said}


def _bundle_state(folder: Path) -> dict[str, Any]:
    bundle = load_bundle(folder)
    said = f"{folder}: {bundle.format} {bundle.precision}, {bundle.bytes / 1e6:.1f} MB: {bundle.verdict}"
    said += f" ({bundle.reason})" if bundle.reason and bundle.verdict != "PASS" else ""
    return {"folder": str(folder), "id": bundle.id, "said": said}


def _student_is(result: Any) -> bool:
    """Whether the student of an earlier run is still there."""
    with contextlib.suppress(RobxError):
        return bool(_student_state(Path(result["folder"]))["id"] == result["id"])
    return False


def _bundle_is(result: Any) -> bool:
    """Whether the bundle of an earlier run is still there."""
    with contextlib.suppress(RobxError):
        return bool(_bundle_state(Path(result["folder"]))["id"] == result["id"])
    return False


def _latency(folder: Path, record: Latency) -> str:
    p50 = record.values.get("p50")
    why = f" ({'; '.join(record.reasons)})" if record.reasons else ""
    return f"{folder.name} {'' if p50 is None else f'p50 {p50.value:.2f} ms, '}{record.verdict}{why}"
