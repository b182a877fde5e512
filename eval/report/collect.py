"""What a report is made from: the Students, Bundles and Measurements under some folders, and their files."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from robx.errors import ArtifactError, InputError, RobxError
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
)
from robx.store.files import MAX_JSON_BYTES, sha256_file

MAX_SAMPLES_BYTES = 256 * 1024 * 1024
_LARGEST = 1e300  # NaN and infinity are not below it, nor an integer that no float holds


@dataclass(frozen=True, kw_only=True)
class Run:
    """One distillation: its Student and its curves, one dict of numbers a line of ``metrics.jsonl``."""

    folder: str
    student: Student
    bytes: int = 0  # of the weights
    curves: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One Bundle and where it lies."""

    folder: str
    bundle: Bundle


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """One measurement and the line of the file that holds it."""

    record: Measurement
    file: str
    line: int

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that was found and could not be used, and why."""

    where: str
    what: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report says; `samples` maps a file's SHA-256 to its latencies in ms, one array a process."""

    runs: tuple[Run, ...] = ()
    bundles: tuple[Packed, ...] = ()
    measurements: tuple[Sourced, ...] = ()
    samples: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def students(self) -> dict[str, Student]:
        """Every student by its SHA-256: those of the runs, and those that only a bundle remembers."""
        found = {packed.bundle.student.sha256: packed.bundle.student for packed in self.bundles}
        return found | {run.student.sha256: run.student for run in self.runs}

    def of_kind(self, kind: type[Fidelity] | type[Accuracy] | type[Latency]) -> Iterator[Sourced]:
        """The measurements of one kind, oldest first."""
        return (m for m in sorted(self.measurements, key=lambda m: m.record.started) if isinstance(m.record, kind))


def collect(folders: Sequence[Path]) -> ReportData:
    """Read all that robx wrote under `folders`: run folders, bundle folders, or folders that contain them.

    A damaged or incomplete artifact becomes a Problem of the page instead of stopping it.

    Raises:
        InputError: a folder does not exist, or nothing in them was written by robx.
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
            if "manifest.json" in files:
                bundles.append(Packed(folder=where, bundle=load_bundle(folder)))
        except (RobxError, OSError) as error:
            problems.append(Problem(where=where, what=str(error)))
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
    """Each folder once, in order of name; hidden ones (half-written, caches) and links are left out."""

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
        problems.append(Problem(where=str(path), what=str(error)))
        return []
    return [Sourced(record=record, file=str(path), line=line) for line, record in enumerate(records, start=1)]


def _read_curves(path: Path, problems: list[Problem]) -> tuple[dict[str, float], ...]:
    if path.stat().st_size > MAX_JSON_BYTES:
        problems.append(Problem(where=str(path), what=f"larger than {MAX_JSON_BYTES} bytes: the curves are left out"))
        return ()
    found = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):  # the last line may be half a line of a run that was cut off
                problems.append(Problem(where=f"{path}:{number}", what="not valid JSON: the line is left out"))
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
        if not isinstance(record, Latency) or record.samples is None:
            continue
        try:
            samples[record.samples_sha256 or ""] = _read_raw(folder, record)
        except (ArtifactError, OSError, ValueError, zipfile.BadZipFile) as error:
            problems.append(Problem(where=measurement.place, what=f"raw samples {record.samples!r}: {error}"))
    samples.pop("", None)
    return samples


def _read_raw(folder: Path, record: Latency) -> tuple[np.ndarray, ...]:
    """Latencies in ms, one array a process, of the samples file that `record` names and hashes."""
    name = record.samples or ""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        raise ArtifactError("outside of the bundle's folder: not read")
    if not path.is_file():
        raise ArtifactError("the file is missing: measure again")
    if path.stat().st_size > MAX_SAMPLES_BYTES or sha256_file(path) != record.samples_sha256:
        raise ArtifactError("not the file that was measured (its SHA-256 differs): measure again")
    with zipfile.ZipFile(path) as parts:
        if sum(part.file_size for part in parts.infolist()) > MAX_SAMPLES_BYTES:
            raise ArtifactError(f"larger than {MAX_SAMPLES_BYTES} bytes: not read")
    with np.load(path, allow_pickle=False) as archive:
        arrays = [(key, archive[key]) for key in sorted(archive.files)]
    kept = [a for key, a in arrays if a.ndim == 1 and a.size and a.dtype.kind in "iu" and "warm" not in key]
    if not kept:
        raise ArtifactError("holds no integer nanoseconds: measure again")
    return tuple(array.astype(np.float64) / 1e6 for array in kept)
