"""What a report is made of: the Students, Bundles and Measurements below some folders, and what to call them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from robx.errors import ArtifactError, InputError, RobxError
from robx.eval.report.samples import read_samples
from robx.path_ends import path_ends
from robx.records import (
    Accuracy,
    Bundle,
    Fidelity,
    Json,
    Latency,
    Measurement,
    Student,
    load_bundle,
    load_measurements,
    load_student,
    outdated,
    unfinished,
)
from robx.store.files import MAX_JSON_BYTES

_LARGEST = 1e300  # comparing with it also refuses NaN, infinity and integers that no float holds
# The keys of a device description that may name it; the others (load, temperature, clocks) change by the minute.
_DEVICE_NAMES = ("name", "board", "cpu", "model", "soc", "host", "id")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One distillation run: its Student, and its curves as one dict of numbers per line of ``metrics.jsonl``."""

    folder: str
    student: Student
    bytes: int = 0  # of the weights
    curves: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A Bundle and its folder."""

    folder: str
    bundle: Bundle


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """A measurement, and the file and line that it was read from."""

    record: Measurement
    file: str
    line: int

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.file}:{self.line}"

    @property
    def model_id(self) -> str:
        """The id of the model that was measured."""
        return self.record.model_id if isinstance(self.record, Accuracy) else self.record.bundle_id


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that was found but cannot be used, and why."""

    where: str
    what: str
    kind: str = "DAMAGED"


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report is made of; `samples` maps a file's SHA-256 to its latencies in ms, one array per process."""

    runs: tuple[Run, ...] = ()
    bundles: tuple[Packed, ...] = ()
    measurements: tuple[Sourced, ...] = ()
    samples: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @cached_property
    def students(self) -> dict[str, Student]:
        """Every student by its SHA-256: those of the runs, and those known only from a bundle."""
        found = {packed.bundle.student.sha256: packed.bundle.student for packed in self.bundles}
        return found | {run.student.sha256: run.student for run in self.runs}

    @cached_property
    def names(self) -> dict[str, str]:
        """A unique name per student, by SHA-256: timm's; where that is ambiguous with the run's folder, or the hash."""
        places = {run.student.sha256: run.folder for run in reversed(self.runs)}
        return unique_names({sha256: student.timm_name for sha256, student in self.students.items()}, places)

    @cached_property
    def labels(self) -> dict[str, str]:
        """``resnet18 · openvino int8`` by model id, unique, for every student and bundle."""
        students = {sha256[:16]: model_label(name, "torch", "fp32") for sha256, name in self.names.items()}
        bundles = {packed.bundle.id: packed for packed in reversed(self.bundles)}
        return students | {
            id_: model_label(self.name_of(packed.bundle), packed.bundle.format, self.variant_of(packed.bundle))
            for id_, packed in bundles.items()
        }

    def variant_of(self, bundle: Bundle) -> str:
        """``int8``; with the folder, or the id, where the student has several int8 bundles of this format and size."""
        return self._variants[bundle.id]

    @cached_property
    def _variants(self) -> dict[str, str]:
        bundles = {packed.bundle.id: packed for packed in reversed(self.bundles)}
        plain = {
            id_: model_label(self.name_of(packed.bundle), packed.bundle.format, packed.bundle.precision)
            for id_, packed in bundles.items()
        }
        told = unique_names(plain, {id_: packed.folder for id_, packed in bundles.items()})
        return {id_: packed.bundle.precision + told[id_].removeprefix(plain[id_]) for id_, packed in bundles.items()}

    def device_of(self, record: Latency) -> str:
        """`device_label`; with the machine's own name where several machines of one kind were measured."""
        label, machine = device_label(record), _machine(record)
        return f"{label} ({machine})" if machine and len(self._machines[label]) > 1 else label

    @cached_property
    def _machines(self) -> dict[str, set[str]]:
        """The machines behind each device label."""
        found: dict[str, set[str]] = {}
        for _, record in self.latencies:
            found.setdefault(device_label(record), set()).add(_machine(record))
        return found

    def name_of(self, bundle: Bundle) -> str:
        """Its student's name; with the input size, height by width, where that is not the student's own."""
        name, shape = self.names[bundle.student.sha256], bundle.preprocessing.shape
        own = self.students[bundle.student.sha256].preprocessing.shape
        return name if shape == own else f"{name} at {shape[0]}x{shape[1]}"

    @cached_property
    def accuracies(self) -> list[tuple[Sourced, Accuracy]]:
        """The Accuracy measurements, oldest first."""
        return [(m, m.record) for m in self._by_age if isinstance(m.record, Accuracy)]

    @cached_property
    def fidelities(self) -> list[tuple[Sourced, Fidelity]]:
        """The Fidelity measurements, oldest first."""
        return [(m, m.record) for m in self._by_age if isinstance(m.record, Fidelity)]

    @cached_property
    def latencies(self) -> list[tuple[Sourced, Latency]]:
        """The Latency measurements, oldest first."""
        return [(m, m.record) for m in self._by_age if isinstance(m.record, Latency)]

    @property
    def _by_age(self) -> list[Sourced]:
        return sorted(self.measurements, key=lambda m: m.record.started)


def model_label(name: str, format_: str, precision: str) -> str:
    """What the report calls one model: ``resnet18 · openvino int8``."""
    return f"{name} · {format_} {precision}"


def device_label(record: Latency) -> str:
    """What the report calls a device and the way it was used, e.g. ``Raspberry Pi 5, 4 threads``."""
    device, settings = record.device, record.settings
    # A PC's board is an order number or a cloud's name: its processor says more.
    pc = str(device.get("arch", "")).lower() in ("x86_64", "amd64", "i686")
    names = ("name", "cpu", "board") if pc else _DEVICE_NAMES
    parts = [next((text for key in names if (text := text_of(device.get(key)))), "unnamed device")]
    facts = settings.get("runtime")
    provider = text_of(facts.get("provider")) if isinstance(facts, Mapping) else ""
    if provider and "cpu" not in provider.lower():
        parts.append(" ".join(filter(None, (provider, text_of(device.get("accelerator"))))))
    if isinstance(threads := settings.get("threads"), int):
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if (batch := settings.get("batch", 1)) != 1:
        parts.append(f"batch {text_of(batch)}")
    if isinstance(cores := settings.get("affinity"), list):
        parts.append(f"cores {' '.join(map(str, cores))}")
    if (hint := settings.get("precision_hint", "f32")) != "f32":
        parts.append(f"computing in {text_of(hint)}")
    if device.get("emulated") or any(reason.startswith("emulated:") for reason in record.reasons):
        parts.append("emulated")
    return ", ".join(parts)


def _machine(record: Latency) -> str:
    """What tells a machine from another of its kind: its serial number or host name; "" where neither was recorded."""
    return text_of(record.device.get("id")) or text_of(record.device.get("host"))


def unique_names(names: Mapping[str, str], places: Mapping[str, str]) -> dict[str, str]:
    """`names` by key, made unique: ``name (end of its place)`` where several share one, else ``name (key's start)``.

    Args:
        names: key, a hash, -> name.
        places: key -> the path that it was read from; keys without one are told apart by the hash.
    """
    keys: dict[str, list[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, []).append(key)
    found = {}
    for name, sharing in keys.items():
        tails = path_ends([places.get(key, "") for key in sharing])
        for key, tail in zip(sharing, tails, strict=True):
            found[key] = name if len(sharing) == 1 else f"{name} ({tail or key[:8]})"
    return {key: found[key] for key in names}


def text_of(value: Json) -> str:
    """A short text for a JSON value of a device's description."""
    if isinstance(value, dict):
        return next((text for key in ("name", "model") if (text := text_of(value.get(key)))), "")
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def collect(folders: Sequence[Path]) -> ReportData:
    """Read everything robx wrote below `folders`: run folders, bundle folders, or folders that contain them.

    A damaged, incomplete or outdated artifact becomes a Problem on the page and does not stop it.

    Raises:
        InputError: a folder does not exist, or holds nothing that robx wrote.
    """
    runs: list[Run] = []
    bundles: list[Packed] = []
    measurements: list[Sourced] = []
    samples: dict[str, tuple[np.ndarray, ...]] = {}
    problems: list[Problem] = []
    for folder, files in _walk(folders, problems):
        where = str(folder)
        try:
            if "student.json" in files:
                runs.append(_read_run(folder, problems))
                if interrupted := unfinished(runs[-1].student):
                    problems.append(Problem(where=where, what=interrupted, kind="UNFINISHED"))
            if "manifest.json" in files:
                bundle = load_bundle(folder)
                if why := outdated(folder, bundle):
                    problems.append(Problem(where=where, what=f"left out: {why}", kind="EXCLUDED"))
                    continue  # with what was measured of it
                if interrupted := unfinished(bundle.student):
                    problems.append(Problem(where=where, what=interrupted, kind="UNFINISHED"))
                bundles.append(Packed(folder=where, bundle=bundle))
        except (RobxError, OSError) as error:
            problems.append(_problem(folder, error))
        if "measurements.jsonl" in files:
            found = _read_measurements(folder / "measurements.jsonl", problems)
            measurements += found
            samples |= _read_samples(folder, found, problems)
    if not (runs or bundles or measurements or problems):
        raise InputError(
            f"{', '.join(map(str, folders))} holds no student, bundle or measurement: "
            "give a folder that robx distill or robx export wrote"
        )
    return ReportData(
        runs=tuple(runs),
        bundles=tuple(bundles),
        measurements=tuple(measurements),
        samples=samples,
        problems=tuple(problems),
    )


def _walk(folders: Sequence[Path], problems: list[Problem]) -> Iterator[tuple[Path, set[str]]]:
    """Each folder once, in order of name, without hidden folders (half-written, caches) and links."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(where=str(error.filename), what=f"cannot be read ({error.strerror})"))

    seen: set[Path] = set()
    for top in folders:
        if not top.is_dir():
            raise InputError(f"{top} is not a folder: give a folder that robx distill or robx export wrote")
        for root, names, files in os.walk(top, onerror=unreadable):
            names[:] = sorted(name for name in names if not name.startswith("."))
            folder = Path(root)
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder, set(files)


def _problem(path: Path, error: Exception) -> Problem:
    """A file or folder that cannot be used; a message that begins with the path is not repeated after it."""
    what = str(error)
    if what.startswith(str(path)) and (rest := what.removeprefix(str(path)).lstrip(" :,")):
        what = rest
    return Problem(where=str(path), what=what)


def _read_run(folder: Path, problems: list[Problem]) -> Run:
    student = load_student(folder)
    curves = folder / "metrics.jsonl"
    return Run(
        folder=str(folder),
        student=student,
        bytes=(folder / "student.safetensors").stat().st_size,
        curves=_read_curves(curves, problems) if curves.is_file() else (),
    )


def _read_measurements(path: Path, problems: list[Problem]) -> list[Sourced]:
    try:
        records = load_measurements(path)
    except (RobxError, OSError, UnicodeDecodeError) as error:
        problems.append(_problem(path, error))
        return []
    return [Sourced(record=record, file=str(path), line=line) for line, record in enumerate(records, start=1)]


def _read_curves(path: Path, problems: list[Problem]) -> tuple[dict[str, float], ...]:
    if path.stat().st_size > MAX_JSON_BYTES:
        problems.append(Problem(where=str(path), what=f"larger than {MAX_JSON_BYTES} bytes: its curves are left out"))
        return ()
    found = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):  # an interrupted run may leave half a last line
                problems.append(Problem(where=f"{path}:{number}", what="not valid JSON: this line is left out"))
            continue
        if isinstance(value, dict):
            found.append(_numbers(value))
    return tuple(found)


def _numbers(value: Json, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a JSON object, those of inner objects under ``outer.inner``."""
    found: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, dict) and not prefix:
            found |= _numbers(item, f"{key}.")
        elif isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < _LARGEST:
            found[prefix + str(key)] = float(item)
    return found


def _read_samples(folder: Path, found: list[Sourced], problems: list[Problem]) -> dict[str, tuple[np.ndarray, ...]]:
    samples = {}
    for measurement in found:
        record = measurement.record
        if not isinstance(record, Latency) or record.samples is None or not record.samples_sha256:
            continue
        try:
            samples[record.samples_sha256] = read_samples(folder, record.samples, record.samples_sha256)
        except ArtifactError as error:
            problems.append(Problem(where=measurement.place, what=f"raw samples {record.samples!r}: {error}"))
    return samples
