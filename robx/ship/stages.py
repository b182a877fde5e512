"""The stages of a plan as calls of ``robx.api``: their arguments, what they depend on, and whether they are done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robx.distill.presets import NAMED
from robx.distill.recipe_toml import read_recipe
from robx.distill.recipes import Recipe
from robx.errors import RobxError
from robx.eval.evaluate import EvalSettings
from robx.formats import RUNTIMES
from robx.records import SUPERSEDED, load_bundle, load_student
from robx.ship.command_line import has_option
from robx.ship.inputs import Images
from robx.ship.plan import Entry, Plan, Table
from robx.store.files import read_json, sha256_bytes, sha256_file, write_json
from robx.store.toml import toml_value

RECIPE = "recipe.toml"  # keys of the recipe in the plan's [distill]
_RECIPE_KEYS = {f.name for f in dataclasses.fields(Recipe)}
_RATES = {"lr_batch", "warmup_lr", "final_lr"}  # which an lr among the arguments sets too
_COMPARING = ("fidelity", "margin", "reference")  # arguments of an evaluation that need a bundle
# Arguments that may be folders to read, and the files in them that change with the rest.
_READ_FOLDERS = ("init", "reference", "lowshot_splits")
_IDENTIFYING = ("student.json", "targets.json", "*.txt", "imagenet_subsets*/*.txt")


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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, ready to run."""

    entry: Entry
    title: str
    arguments: dict[str, Any]
    inputs: tuple[str, ...] = ()  # identities of the student and the bundles that it reads
    measured: tuple[Path, ...] = ()  # folders that it writes measurements into

    @property
    def key(self) -> str:
        """Its name in the state."""
        return f"{self.entry.number} {self.title}"


@dataclass
class Stages:
    """The stages of one plan. Images are listed once, however many stages read them."""

    plan: Plan
    _images: dict[Path, Images] = field(default_factory=dict)

    @property
    def student(self) -> Path:
        """The student's folder."""
        return self.plan.out / "student"

    @property
    def distill_start(self) -> dict[str, Any]:
        """The arguments of the distillation that come from the top of the plan."""
        plan = self.plan
        return {"teacher": plan.teacher, "student": plan.student, "data": plan.data, "out": self.student}

    def distill(self, entry: Entry) -> Stage:
        """The distillation."""
        plan = self.plan
        return Stage(
            entry=entry,
            title=f"Distil {plan.student} from {plan.teacher}",
            arguments=self.distill_start | self._distill_arguments(),
        )

    def export(self, entry: Entry) -> Stage:
        """One export of the student."""
        precision = precision_of(entry.table)
        return Stage(
            entry=entry,
            title=f"Export to {entry.table['format']} {precision}",
            arguments=self.export_arguments(entry),
            inputs=(load_student(self.student).sha256,),
        )

    def export_arguments(self, entry: Entry) -> dict[str, Any]:
        """The arguments of one export; the plan's margin is that of models that the gate judges."""
        margin = self.plan.with_margin("export") if precision_of(entry.table) != "fp32" else {}
        own = {"student": self.student, "format": entry.table["format"], "data": self.plan.data}
        return own | margin | _arguments(entry.table)

    def evaluate(self, entry: Entry, bundles: Sequence[Path]) -> Stage:
        """The evaluation of the student and the bundles that run on this machine; without any, nothing is compared."""
        models = [self.student, *filter(_runs_here, bundles)]
        arguments = self.eval_arguments(entry, models)
        if len(models) == 1:
            arguments = {name: value for name, value in arguments.items() if name not in _COMPARING}
        return Stage(
            entry=entry,
            title="Evaluate the student and its exports",
            arguments=arguments,
            inputs=(load_student(self.student).sha256, *(load_bundle(folder).id for folder in models[1:])),
            measured=tuple(models),
        )

    def eval_arguments(self, entry: Entry, models: Sequence[Path]) -> dict[str, Any]:
        """The arguments of the evaluation; the plan's margin is that of a comparison with the student."""
        margin = self.plan.with_margin("eval") if entry.table.get("fidelity") else {}
        return {"models": list(models), "data": self.plan.data} | margin | _arguments(entry.table)

    def bench(self, entry: Entry, bundles: Sequence[Path]) -> Stage:
        """The measurements on one device; `measured` is empty where no bundle is for it."""
        device = entry.table.get("device", "local")
        chosen = _on_device(bundles, entry.table)
        return Stage(
            entry=entry,
            title=f"Measure latency on {'this machine' if device == 'local' else device}",
            arguments=self.bench_arguments(entry, chosen),
            inputs=tuple(load_bundle(folder).id for folder in chosen),
            measured=tuple(chosen),
        )

    def bench_arguments(self, entry: Entry, bundles: Sequence[Path]) -> dict[str, Any]:
        """The arguments of the measurements on one device."""
        return {"bundles": list(bundles), "data": self.plan.data, **_arguments(entry.table)}

    def report(self, entry: Entry) -> Stage:
        """The report on everything in the output folder."""
        own = {"folders": [self.plan.out], **self.plan.with_margin("report"), **entry.table}
        return Stage(entry=entry, title="Write the report", arguments=own | {"out": self.plan.out / "report.html"})

    def why_no_accuracy(self, entry: Entry) -> str:
        """Why the evaluation is left out: images without labels or without a test split; empty if it is not."""
        table, data = entry.table, self.plan.data
        if not EvalSettings.of(**self.eval_arguments(entry, [self.student])).splits:
            return ""  # transfers have images of their own
        images = self.images_in(data)
        if "test" not in table and not images.split:
            return f"{data} has no train/ and test/, so the report will have no accuracy ([eval] test names a test set)"
        if "labels" not in table and not images.labelled:
            return f"{data} has no class labels, so the report will have no accuracy"
        return ""

    def images_in(self, data: Path) -> Images:
        """The images of a data set, listed once."""
        if data not in self._images:
            self._images[data] = Images.open(data, image_member=self.plan.distill.get("image_member"))
        return self._images[data]

    @property
    def recipe_text(self) -> str:
        """The recipe file of the distillation, for the keys of the recipe without an option; may be empty."""
        given, keys = self.plan.distill.get("recipe"), self._recipe_keys()
        if keys and given is not None:
            keys = ({"like": str(given)} if str(given) in NAMED else read_recipe(Path(given))) | keys
        return "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items())

    def _recipe_keys(self) -> dict[str, Any]:
        """The keys of [distill] that go through the recipe file, so that the command can be shown with it.

        An ``lr`` among the arguments decides over its file's other rates, so that these have to stay with it.
        """
        given = self.plan.distill
        of_recipe = {key: value for key, value in given.items() if key in _RECIPE_KEYS}
        in_file = {key: value for key, value in of_recipe.items() if not has_option("distill", key, value)}
        with_lr = _RATES if "lr" in given.keys() - in_file else set()
        return {key: value for key, value in in_file.items() if key not in with_lr}

    def _distill_arguments(self) -> dict[str, Any]:
        """The other keys of [distill], and the recipe file if there is one."""
        in_file = self._recipe_keys()
        arguments = {key: value for key, value in self.plan.distill.items() if key not in in_file}
        return arguments | ({"recipe": self.plan.out / RECIPE} if in_file else {})

    # ------------------------------------------------------------------------------------------------ what is done

    def earlier(self, stage: Stage, state: State) -> Any:
        """The result of an earlier run with the same inputs that is still there; None otherwise."""
        result = state.result(stage.key, self.hash(stage))
        if result is None:
            return None
        check = {"distill": _is_student_there, "export": _is_bundle_there}.get(stage.entry.stage)
        made = [folder / "measurements.jsonl" for folder in stage.measured]
        made += [Path(stage.arguments["save_head"])] if stage.arguments.get("save_head") else []
        there = check(result) if check else all(path.is_file() for path in made)
        return result if there else None

    def hash(self, stage: Stage) -> str:
        """Of a stage's arguments, and of the contents of the files and images that they name."""
        contents = {name: self._contents(name, value) for name, value in stage.arguments.items()}
        return sha256_bytes(json.dumps([stage.entry.stage, contents, list(stage.inputs)], sort_keys=True).encode())

    def _contents(self, name: str, value: Any) -> Any:
        if name in ("data", "test"):
            return [str(value), self.images_in(Path(value)).fingerprint]
        if name == "save_head":  # written by the stage, not read
            return str(value)
        if name == "transfers":  # "NAME" or "NAME=FOLDER"
            return [[str(one), _listing(str(one).partition("=")[2])] for one in value]
        if value == self.plan.out / RECIPE:  # as it will be written
            return [str(value), sha256_bytes(self.recipe_text.encode())]
        if isinstance(value, str | Path) and Path(value).is_file():
            return [str(value), sha256_file(Path(value))]
        if name in _READ_FOLDERS and Path(value).is_dir():
            files = sorted(path for pattern in _IDENTIFYING for path in Path(value).glob(pattern))
            return [str(value), *map(sha256_file, files)]
        return [str(one) for one in value] if isinstance(value, list | tuple) else str(value)

    def finished(self, state: State) -> set[int]:
        """The numbers of the stages that a run would skip; never that of the report, which is always written again."""
        done: set[int] = set()
        bundles: list[Path] = []
        with contextlib.suppress(RobxError):  # a damaged student or bundle: its stage is not done
            for entry in self.plan.tables():
                if entry.stage in ("eval", "bench") and self._waiting(done):
                    continue
                if entry.stage == "eval" and self.why_no_accuracy(entry):
                    continue
                match entry.stage:
                    case "distill":
                        stage = self.distill(entry)
                    case "export":
                        stage = self.export(entry)
                    case "eval":
                        stage = self.evaluate(entry, bundles)
                    case "bench":
                        stage = self.bench(entry, bundles)
                    case _:
                        continue
                if (result := self.earlier(stage, state)) is not None:
                    done.add(entry.number)
                    if entry.stage == "export" and (folder := Path(result["folder"])) not in bundles:
                        bundles.append(folder)
                elif entry.stage == "distill":
                    break  # everything depends on it
        return done

    def _waiting(self, done: set[int]) -> bool:
        """Whether the measurements wait for an export; an optional one may have failed."""
        exports = [entry for entry in self.plan.tables() if entry.stage == "export"]
        return any(entry.number not in done and not entry.table.get("optional") for entry in exports)


def _listing(root: str) -> str:
    """A hash of the names, sizes and times of the files below a folder; "" for an empty path."""
    if not root:
        return ""
    folder = Path(root)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return sha256_bytes(json.dumps([[name, found.st_size, found.st_mtime_ns] for name, found in stats]).encode())


def precision_of(table: Table) -> str:
    """The precision that an export asks for."""
    return "int8" if table.get("int8") else "fp16" if table.get("fp16") else "fp32"


def student_result(folder: Path) -> dict[str, Any]:
    """What ship.json records of a distillation."""
    student = load_student(folder)
    said = f"{folder}: {student.timm_name}, {student.images_seen} images seen"
    return {"folder": str(folder), "id": student.sha256, "said": said}


def bundle_result(folder: Path) -> dict[str, Any]:
    """What ship.json records of an export."""
    bundle = load_bundle(folder)
    said = f"{folder}: {bundle.format} {bundle.precision}, {bundle.bytes / 1e6:.1f} MB: {bundle.verdict}"
    said += f" ({bundle.reason})" if bundle.verdict != "PASS" and bundle.reason else ""
    return {"folder": str(folder), "id": bundle.id, "said": said}


def _is_student_there(result: Any) -> bool:
    """Whether the student of an earlier run still exists."""
    with contextlib.suppress(RobxError):
        return bool(student_result(Path(result["folder"]))["id"] == result["id"])
    return False


def _is_bundle_there(result: Any) -> bool:
    """Whether the bundle of an earlier run still exists, and no later export replaces it."""
    with contextlib.suppress(RobxError):
        folder = Path(result["folder"])
        return bool(load_bundle(folder).id == result["id"] and not (folder / SUPERSEDED).exists())
    return False


def _arguments(table: Table) -> dict[str, Any]:
    """The arguments of a stage's function: its table without the plan's own keys."""
    return {key: value for key, value in table.items() if key not in ("optional", "formats")}


def wanted_formats(table: Table) -> list[str] | None:
    """The formats of the bundles to measure on a device; None: all that run there."""
    wanted = table.get("formats")
    return [wanted] if isinstance(wanted, str) else None if wanted is None else list(wanted)


def _on_device(bundles: Sequence[Path], table: Table) -> list[Path]:
    """The bundles to measure on a device: those of the wanted formats or, without any, those that run here."""
    if (names := wanted_formats(table)) is not None:
        return [folder for folder in bundles if load_bundle(folder).format in names]
    return [folder for folder in bundles if table.get("device", "local") != "local" or _runs_here(folder)]


def _runs_here(folder: Path) -> bool:
    """Whether this machine can open the bundle: TensorRT needs a GPU, Core ML a Mac."""
    bundle = load_bundle(folder)
    if bundle.format == "trt":
        import torch

        return torch.cuda.is_available()
    return RUNTIMES[bundle.runtime].engine is not None
