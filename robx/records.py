"""The records that cross a border between two stages, and their JSON form. Read this first.

    images --distill--> Student --export--> Bundle --runtime--> Session --eval--> Measurements --report--> page

Every record is a frozen dataclass of plain values. On disk it is JSON with a ``schema`` number; a file of a newer
schema, with an unknown key, or with a value of the wrong type is refused with a line that says so.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from robx.errors import ArtifactError, InputError
from robx.files import MAX_JSON_BYTES, read_json, sha256_bytes, sha256_file, write_json, write_text

SCHEMA = 1

Json = Any  # null, bool, int, float, str, list or dict of these
Record = TypeVar("Record")

Format = Literal["onnx", "openvino", "trt", "ort", "executorch", "litert", "coreml", "ncnn"]
Precision = Literal["fp32", "fp16", "int8"]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Validity = Literal["VALID", "UNSTABLE", "INVALID"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an RGB image becomes the model's input: shorter side to `size`, centre crop, [0, 1], minus mean, over std."""

    size: int  # pixels of the shorter side after the resize
    crop: int  # pixels of the square that the model sees
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """Which images something was made from."""

    name: str
    images: int
    fingerprint: str  # ImageSource.fingerprint
    licence: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """The frozen teacher that a student was distilled from; its weights are never stored with the student."""

    name: str
    sha256: str  # of the published file, or of the weights when they came from a package
    licence: str
    prototypes: str = "published"  # or how they were fitted


@dataclass(frozen=True, kw_only=True)
class Student:
    """A folder: ``student.safetensors`` (the trunk alone) and this, as ``student.json``."""

    timm_name: str
    width: int  # D, the width of the embedding
    preprocessing: Preprocessing
    sha256: str  # of student.safetensors
    teacher: TeacherInfo | None
    data: DataInfo | None
    recipe: dict[str, Json]  # the resolved recipe
    images_seen: int = 0  # crops' source images, all epochs
    robx_version: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of an exported model; None is a dynamic axis."""

    name: str
    dtype: Literal["float32", "float16", "uint8", "int8"]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class BundleFile:
    """One file of a Bundle, relative to its folder."""

    path: str
    role: Literal["model", "weights", "recipe", "engine", "operators", "labels", "notes"]
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Value:
    """A figure with its interval and the number of samples behind it."""

    value: float
    low: float | None = None  # 95 % unless the settings say otherwise
    high: float | None = None
    n: int | None = None
    unit: str = ""  # "%", "ms", "MB", "" for a ratio or a cosine


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One candidate of the ladder: what was tried, what was measured, and why it was kept or not."""

    name: str
    settings: dict[str, Json]
    precision: Precision
    accuracy: Verdict
    speed: Verdict
    values: dict[str, Value]  # cosine_mean, cosine_p5, cosine_p1, cosine_min, knn_drop, probe_drop, speedup, ...
    reason: str
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The images that a quantiser saw, and those that judged it; disjoint by construction."""

    images: int
    fingerprint: str
    judged_images: int
    judged_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder: the model files of one format and precision, and this, as ``manifest.json``, written last."""

    format: Format
    precision: Precision  # the true one
    requested: Precision  # the one that was asked for
    target: str  # "local", "rtx:sm89", "jetson-orin", "arm64", ...
    runtime: str  # the engine that runs it: onnxruntime, openvino, tensorrt, tensorrt_rtx, ...
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    student: Student
    verdict: Verdict | Literal["FORCED", "NOT_JUDGED"]
    reason: str
    rungs: tuple[Rung, ...]
    calibration: Calibration | None
    opset: int | None
    versions: dict[str, str]
    files: tuple[BundleFile, ...]
    labels: tuple[str, ...] | None = None  # class names when the bundle has a head
    parity: dict[str, Value] = field(default_factory=dict)  # against torch, in the shipped shape mode
    robx_version: str = ""
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """Sixteen hex digits that change with any of the bundle's files."""
        return sha256_bytes("".join(sorted(f.path + f.sha256 for f in self.files)).encode())[:16]

    @property
    def bytes(self) -> int:
        """What is shipped, in bytes."""
        return sum(f.bytes for f in self.files)

    @property
    def model(self) -> BundleFile:
        """The file that the runtime opens."""
        return next(f for f in self.files if f.role == "model")


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A bundle's answers against its fp32 student's, on the same images, paired."""

    bundle_id: str
    device: dict[str, Json]
    settings: dict[str, Json]
    values: dict[str, Value]
    verdict: Verdict
    reasons: tuple[str, ...]
    started: str  # UTC, ISO 8601
    kind: Literal["fidelity"] = "fidelity"
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One protocol's result for one model: a Student or a Bundle."""

    model_id: str  # Bundle.id, or the first sixteen hex digits of Student.sha256
    model_name: str
    protocol: str  # "knn", "linear", "lowshot", "transfer:cifar10", ...
    device: dict[str, Json]
    settings: dict[str, Json]
    data: DataInfo
    values: dict[str, Value]  # top1, top5 in %, ...
    started: str
    kind: Literal["accuracy"] = "accuracy"
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One bench of one bundle on one device."""

    bundle_id: str
    device: dict[str, Json]
    settings: dict[str, Json]  # profile, threads, affinity, warm-up, processes, precision hint, ...
    values: dict[str, Value]  # p50, p90, p99, load, first, preprocess in ms; peak_memory in MB; energy in J; ...
    verdict: Validity
    reasons: tuple[str, ...]
    samples: str | None  # file of raw samples beside the record
    samples_sha256: str | None
    started: str
    missing: dict[str, str] = field(default_factory=dict)  # figure -> why it could not be had
    kind: Literal["latency"] = "latency"
    schema: int = SCHEMA


Measurement = Fidelity | Accuracy | Latency
_KINDS: dict[str, type[Fidelity] | type[Accuracy] | type[Latency]] = {
    "fidelity": Fidelity,
    "accuracy": Accuracy,
    "latency": Latency,
}


def to_json(record: Any) -> Json:
    """A record as plain JSON values."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


def from_json(cls: type[Record], value: Json, *, where: str = "record") -> Record:
    """A record from plain JSON values.

    Raises:
        ArtifactError: a newer schema, an unknown or missing key, or a value of another type; the message names it.
    """
    schema = value.get("schema") if isinstance(value, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(f"{where} has schema {schema} and this robx reads up to {SCHEMA}: upgrade robx")
    return typing.cast(Record, _parse(cls, value, where))


def save_student(student: Student, folder: Path) -> None:
    """Write ``student.json`` into `folder`."""
    write_json(folder / "student.json", to_json(student))


def load_student(folder: Path) -> Student:
    """Read and verify a Student's folder.

    Raises:
        ArtifactError: no student there, a newer schema, or weights whose hash is another.
    """
    student = from_json(Student, read_json(folder / "student.json"), where=str(folder / "student.json"))
    _verify(folder, "student.safetensors", student.sha256)
    return student


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write ``manifest.json`` into `folder`; call it last, when every other file is there."""
    write_json(folder / "manifest.json", to_json(bundle))


def load_bundle(folder: Path) -> Bundle:
    """Read and verify a Bundle's folder: every file is there, inside it, with its size and hash.

    Raises:
        ArtifactError: no bundle there, a newer schema, or a file that is missing, changed or outside the folder.
    """
    bundle = from_json(Bundle, read_json(folder / "manifest.json"), where=str(folder / "manifest.json"))
    if not any(file.role == "model" for file in bundle.files):
        raise ArtifactError(f"{folder / 'manifest.json'} lists no model file: export the bundle again")
    for file in bundle.files:
        _verify(folder, file.path, file.sha256)
    return bundle


def describe_file(folder: Path, path: str, role: typing.Any) -> BundleFile:
    """The BundleFile of `folder`/`path` as it is now."""
    full = folder / path
    return BundleFile(path=path, role=role, bytes=full.stat().st_size, sha256=sha256_file(full))


def utc_now() -> str:
    """Now, as a Measurement's `started`: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_measurements(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add records to a JSON-lines file, atomically: readers see all of them or none."""
    old = path.read_text() if path.exists() else ""
    lines = [json.dumps(to_json(m), allow_nan=False) + "\n" for m in measurements]
    write_text(path, old + "".join(lines))


def load_measurements(path: Path) -> list[Measurement]:
    """Every record of a JSON-lines file.

    Raises:
        ArtifactError: a line that is no measurement; the message has its number.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: run robx bench or robx eval first")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ArtifactError(f"{path} is larger than {MAX_JSON_BYTES} bytes: not a file that robx wrote")
    found: list[Measurement] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"{where} is not valid JSON ({error}): remove the line") from error
        cls = _KINDS.get(value.get("kind", "")) if isinstance(value, dict) else None
        if cls is None:
            raise ArtifactError(f"{where} is no measurement: its kind is none of {', '.join(_KINDS)}")
        found.append(from_json(cls, value, where=where))
    return found


def _verify(folder: Path, name: str, sha256: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        raise ArtifactError(f"{folder} refers to {name!r}, outside of itself: do not use it")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: the folder is incomplete; make it again")
    if sha256_file(path) != sha256:
        raise ArtifactError(f"{path} is not the file that was written (its SHA-256 differs): make it again")


def _parse(kind: Any, value: Json, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _parse_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ArtifactError(f"{where}: {value!r} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: {value!r} is not an object")
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _parse_record(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ArtifactError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value


def _parse_union(kinds: tuple[Any, ...], value: Json, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _parse(kind, value, where)
        except ArtifactError as error:
            errors.append(error)
    raise errors[-1]


def _parse_tuple(kinds: tuple[Any, ...], value: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ArtifactError(f"{where}: {value!r} is not a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_parse(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(kinds) != len(value):
        raise ArtifactError(f"{where}: {len(kinds)} items were expected, and there are {len(value)}")
    return tuple(_parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _parse_record(cls: type, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: an object was expected, not {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - set(fields)):
        raise ArtifactError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(fields)}")
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(value)):
        raise ArtifactError(f"{where}: the key {missing[0]!r} is missing")
    return cls(**{name: _parse(hints[name], item, f"{where}.{name}") for name, item in value.items()})
