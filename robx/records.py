"""The records that pass from one stage to the next, and their JSON form. Read this first.

    images --distill--> Student --export--> Bundle --runtime--> Session --eval--> Measurements --report--> page

Every record is a frozen dataclass of plain values. On disk it is JSON with a ``schema`` number; a file with a newer
schema, an unknown key, or a value of the wrong type is refused with one line that names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from robx.errors import ArtifactError, InputError, counted
from robx.formats import Format as Format
from robx.formats import Precision as Precision
from robx.store.dataclass_json import SCHEMA as SCHEMA
from robx.store.dataclass_json import Json as Json
from robx.store.dataclass_json import from_json as from_json
from robx.store.dataclass_json import parse_json
from robx.store.dataclass_json import to_json as to_json
from robx.store.files import read_bytes, read_json, sha256_bytes, sha256_file, verify_file, write_bytes, write_json
from robx.store.folders import require_writable
from robx.store.locks import turn

# Channel statistics of ImageNet's training images, RGB in [0, 1]; most published models are trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIDE = 4096  # largest side of a model's input, in pixels
MAX_BATCH_BYTES = 2**30  # of one fixed batch of a bundle's input in float32

_DIMS = {4: "3, H, W", 2: "D"}  # of an input and an output, behind the batch

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Validity = Literal["VALID", "UNSTABLE", "INVALID"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an RGB image becomes the model's input: resize the shorter side, centre crop, scale to [0, 1], normalise.

    A crop that is not square (`crop_width`) gets the same margin: the image is resized, with its aspect ratio kept, to
    cover size / crop times the crop.
    """

    size: int  # shorter side after the resize, in pixels
    crop: int  # side of the square centre crop, or its height, in pixels
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_width: int | None = None  # pixels; None: a square

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the model's input, in pixels."""
        return self.crop, self.crop_width or self.crop

    @property
    def image_bytes(self) -> int:
        """Bytes of one preprocessed image, float32 (3, H, W)."""
        height, width = self.shape
        return 3 * height * width * 4

    @property
    def value_range(self) -> tuple[float, float]:
        """The least and the greatest value that a normalised pixel can have, whatever its channel."""
        ends = [(end - mean) / std for mean, std in zip(self.mean, self.std, strict=True) for end in (0.0, 1.0)]
        return min(ends), max(ends)

    def same_pixels(self, other: Preprocessing) -> bool:
        """Whether both see the same pixels of an image, however they normalise them."""
        return dataclasses.replace(self, mean=other.mean, std=other.std) == other

    def __post_init__(self) -> None:
        """Refuse impossible values: a record may come from anywhere."""
        if not all(0 < side <= MAX_SIDE for side in (self.size, *self.shape)) or self.crop_width == 0:
            raise ArtifactError(
                f"preprocessing size {self.size} and crop {self.crop} must be between 1 and {MAX_SIDE} pixels"
            )
        if 0 in self.std:
            raise ArtifactError("the preprocessing's standard deviation must not be 0")


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """(pixels / 255 - mean) / std as a part of the model, whose input is pixels 0..255, uint8.

    With `resize` the model also resizes and crops, as the student's preprocessing says, and takes images of any size.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: Literal["NCHW", "NHWC"] = "NCHW"  # axes of the input
    channels: Literal["RGB", "BGR"] = "RGB"  # their order in the input
    resize: bool = False


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The images that something was made from."""

    name: str
    images: int
    fingerprint: str  # ImageSource.fingerprint
    licence: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """The frozen teacher of a student; its weights are never stored with the student."""

    name: str
    sha256: str  # of the published file, or of the weights if they come from a package
    licence: str
    prototypes: str = "published"  # or how they were fitted


@dataclass(frozen=True, kw_only=True)
class Student:
    """A folder with ``student.safetensors`` (the trunk only) and this record, as ``student.json``."""

    timm_name: str
    width: int  # D, the width of the embedding
    preprocessing: Preprocessing
    sha256: str  # of student.safetensors
    teacher: TeacherInfo | None
    data: DataInfo | None
    recipe: dict[str, Json]  # the resolved recipe
    images_seen: int = 0  # images read in training, over all epochs
    robx_version: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of an exported model; None in the shape is a dynamic axis."""

    name: str
    dtype: Literal["float32", "float16", "uint8", "int8"]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class BundleFile:
    """One file of a Bundle, relative to its folder."""

    path: str
    role: Literal["model", "weights", "recipe", "engine", "operators", "labels", "notes", "readme", "golden"]
    bytes: int
    sha256: str

    @property
    def is_documentation(self) -> bool:
        """Whether no runtime needs it: the README and the golden sample."""
        return self.role in ("readme", "golden")


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number with its confidence interval and the number of samples behind it."""

    value: float
    low: float | None = None  # of the 95 % interval, unless the settings say otherwise
    high: float | None = None
    n: int | None = None
    unit: str = ""  # "%", "ms", "MB", "" for a ratio or a cosine


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One candidate of an export: what was tried, what was measured, and why it was kept or not."""

    name: str
    settings: dict[str, Json]
    precision: Precision
    accuracy: Verdict
    speed: Verdict
    values: dict[str, Value]  # cosine_mean, cosine_p5, cosine_p1, cosine_min, knn_drop, probe_drop, speedup, ...
    reason: str
    kept: bool = False

    @property
    def was_judged(self) -> bool:
        """Whether its accuracy was measured on the judging images; otherwise on the screening images."""
        return "screened" not in self.values

    @property
    def has_speed(self) -> bool:
        """Whether its speed-ups can be quoted: a timing without a verdict, as on a busy machine, is not reliable."""
        return self.speed != "INCONCLUSIVE"

    @property
    def accuracy_said(self) -> str:
        """The verdict on the judging images, or why there is none."""
        if not self.values and self.accuracy != "PASS":  # nothing was measured; the reason says why
            return "error" if self.accuracy == "FAIL" else "not tried"
        if self.was_judged:
            return self.accuracy
        return "screened out" if self.accuracy == "FAIL" else "not judged"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The images used to calibrate a quantiser, and those used to judge it; disjoint by construction."""

    images: int
    fingerprint: str
    judged_images: int
    judged_fingerprint: str
    source: str = ""  # fingerprint of the ImageSource that the calibration images were drawn from
    screened_images: int = 0  # used to choose which candidates to judge
    screened_fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class Healing:
    """How a student's weights were fine-tuned, without labels, for the int8 candidates called healed."""

    student_sha256: str  # weights of the float student, whose embeddings were the target
    images: int  # trained on; none of them calibrates, screens or judges
    fingerprint: str
    source: str  # fingerprint of the ImageSource that they were drawn from
    steps: int
    batch: int  # images per step
    minutes: float  # of training
    loss_before: float  # squared error of simulated int8 embeddings over their variance, on calibration images
    loss_after: float
    shortened: bool = False  # to stay within the minutes that were allowed, as the machine became slower
    seed: int = 0

    @property
    def is_in_vain(self) -> bool:
        """Whether int8 did not become closer, so that the healed weights are not used."""
        return self.loss_after >= self.loss_before

    @property
    def said(self) -> str:
        """In words, for a person."""
        trained = f"{counted(self.steps, 'step')} of {counted(self.batch, 'image')}, {self.minutes:.1f} min"
        return f"weights healed in {trained}: int8 error {self.loss_before:.4f}, now {self.loss_after:.4f}"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder with the model files of one format and precision and this record, as ``manifest.json``, written last."""

    format: Format
    precision: Precision  # of the model in the folder
    requested: Precision  # the user asked for
    target: str  # "local", "rtx:sm89", "jetson-orin", "arm64", ...
    runtime: str  # the engine: onnxruntime, openvino, tensorrt, tensorrt_rtx, ...
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing  # on the host, before the model
    student: Student
    verdict: Verdict | Literal["FORCED", "NOT_JUDGED"]
    reason: str
    rungs: tuple[Rung, ...]
    calibration: Calibration | None
    opset: int | None
    versions: dict[str, str]
    files: tuple[BundleFile, ...]
    labels: tuple[str, ...] | None = None  # class names, if the model has a classification head
    parity: dict[str, Value] = field(default_factory=dict)  # difference from PyTorch, at the shipped input shape
    chosen_on: dict[str, Json] = field(default_factory=dict)  # CPU that the gate timed on: arch, model, flags
    robx_version: str = ""
    in_model: Normalisation | None = None  # preprocessing that the model does itself (--uint8-input)
    rewrites: tuple[str, ...] = ()  # of the network before the export, such as re-parameterised blocks
    healing: Healing | None = None  # of its weights; None where they are the student's own
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """Sixteen hex digits that change with any of the bundle's deployed files."""
        return sha256_bytes("".join(sorted(f.path + f.sha256 for f in self.deployed)).encode())[:16]

    @property
    def deployed(self) -> tuple[BundleFile, ...]:
        """The files that a device needs: all but the README and the golden sample."""
        return tuple(file for file in self.files if not file.is_documentation)

    @property
    def bytes(self) -> int:
        """Size of the deployed files, in bytes."""
        return sum(file.bytes for file in self.deployed)

    @property
    def model(self) -> BundleFile:
        """The file that the engine opens."""
        return next(f for f in self.files if f.role == "model")


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A bundle's outputs compared with its fp32 student's on the same images."""

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
    """The result of one evaluation protocol for one model, a Student or a Bundle."""

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
    """One benchmark of one bundle on one device."""

    bundle_id: str
    device: dict[str, Json]
    settings: dict[str, Json]  # profile, threads, affinity, warm-up, processes, precision hint, ...
    values: dict[str, Value]  # p50, p90, p99, load, first, preprocess in ms; peak_memory in MB; energy in J; ...
    verdict: Validity
    reasons: tuple[str, ...]
    samples: str | None  # name of the file with the raw samples, beside the record
    samples_sha256: str | None
    started: str
    missing: dict[str, str] = field(default_factory=dict)  # figure -> why it could not be measured
    kind: Literal["latency"] = "latency"
    schema: int = SCHEMA


Measurement = Fidelity | Accuracy | Latency
_KINDS: dict[str, type[Fidelity] | type[Accuracy] | type[Latency]] = {
    "fidelity": Fidelity,
    "accuracy": Accuracy,
    "latency": Latency,
}


def save_student(student: Student, folder: Path) -> None:
    """Write ``student.json`` into `folder`."""
    write_json(folder / "student.json", to_json(student))


def load_student(folder: Path) -> Student:
    """Read and verify a student's folder.

    Raises:
        ArtifactError: there is no student, its schema is newer, or the weights' hash does not match.
    """
    student = from_json(Student, read_json(folder / "student.json"), where=str(folder / "student.json"))
    verify_file(folder, "student.safetensors", student.sha256)
    return student


def unfinished(student: Student) -> str:
    """How far a training that was interrupted has come; "" if it ended, or if the record does not tell."""
    count, epochs, batch = student.data and student.data.images, *map(student.recipe.get, ("epochs", "batch_size"))
    if not (isinstance(count, int) and isinstance(epochs, int) and isinstance(batch, int) and batch > 0):
        return ""
    planned = epochs * (count // batch) * batch  # an incomplete last batch is dropped
    if student.images_seen >= planned:
        return ""
    return (
        f"the student's training was interrupted after {student.images_seen} of {planned} images: run the same "
        "robx distill again to finish it"
    )


# In a bundle's folder: a later export that would have replaced the bundle was refused by the gate.
SUPERSEDED = "superseded.txt"


def outdated(folder: Path, bundle: Bundle) -> str:
    """Why the bundle in a folder should not be used any more; "" if nothing is known against it.

    A later export in its place was refused, or the run that it lies in has trained another student since.
    """
    if (folder / SUPERSEDED).is_file():
        return "a later export in its place was refused by the gate: export again, or remove it"
    run = folder.resolve().parent
    with contextlib.suppress(ArtifactError):
        student = read_json(run / "student.json") if (run / "student.json").is_file() else {}
        now = student.get("sha256") if isinstance(student, dict) else None
        if now is not None and now != bundle.student.sha256:
            return "it was made from an earlier student than the one in its run: export again, or move it elsewhere"
    return ""


def warn_outdated(folder: Path, record: Bundle | Student, say: Callable[[str], None]) -> None:
    """Say so, in one line, where a bundle that is about to be used should not be any more; see `outdated`."""
    if isinstance(record, Bundle) and (why := outdated(folder, record)):
        say(f"warning: {folder}: {why}")


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write ``manifest.json`` into `folder`; call it last, after every other file is written."""
    write_json(folder / "manifest.json", to_json(bundle))


def load_bundle(folder: Path) -> Bundle:
    """Read and verify a bundle's folder: every file exists, is inside it, and has the recorded size and hash.

    Raises:
        ArtifactError: there is no bundle, its schema is newer, or a file is missing, changed or outside the folder.
    """
    bundle = from_json(Bundle, read_json(folder / "manifest.json"), where=str(folder / "manifest.json"))
    if not any(file.role == "model" for file in bundle.files):
        raise ArtifactError(f"{folder / 'manifest.json'} lists no model file: export the bundle again")
    _check_tensors(bundle, str(folder / "manifest.json"))
    for file in bundle.files:
        verify_file(folder, file.path, file.sha256, size=file.bytes)
    return bundle


def _check_tensors(bundle: Bundle, where: str) -> None:
    """Raise ArtifactError unless the bundle takes batches of preprocessed images and returns a vector for each."""
    for kind, specs, rank in (("input", bundle.inputs, 4), ("output", bundle.outputs, 2)):
        if not specs:
            raise ArtifactError(f"{where} lists no {kind}: export the bundle again")
        for spec in specs:
            if len(spec.shape) != rank or any(n is not None and n < 1 for n in spec.shape):
                shape = str(list(spec.shape))[:80]
                raise ArtifactError(f"{where}: {kind} {spec.name!r} has shape {shape}, which is not (N, {_DIMS[rank]})")
    batch, *image = bundle.inputs[0].shape
    if bundle.in_model is not None and bundle.in_model.layout == "NHWC":
        image = [image[2], *image[:2]]
    height, width = bundle.preprocessing.shape
    if any(have not in (None, want) for have, want in zip(image, (3, height, width), strict=True)):
        takes, makes = str(image)[:80], [3, height, width]
        raise ArtifactError(f"{where}: the model takes images of shape {takes} and preprocessing makes {makes}")
    if batch is not None and batch * bundle.preprocessing.image_bytes > MAX_BATCH_BYTES:
        most, size = MAX_BATCH_BYTES // bundle.preprocessing.image_bytes, f"{height} x {width}"
        raise ArtifactError(f"{where}: a batch of {str(batch)[:12]} images of {size} px: at most {most} are allowed")


def require_bundle(folder: Path) -> None:
    """Raise InputError, with what to give instead, if `folder` is a student and not a bundle."""
    if (folder / "manifest.json").exists() or not (folder / "student.json").is_file():
        return
    found = (path.parent for path in folder.glob("*/manifest.json"))
    bundles = sorted(place for place in found if not (place / SUPERSEDED).exists())
    if not bundles:
        raise InputError(f"{folder} is a student, not a bundle: export it with robx export, and give the bundle")
    advice = "give one of its bundles: " if len(bundles) > 1 else "give its bundle, "
    listed = ", ".join(map(str, bundles[:3])) + (f" (and {len(bundles) - 3} more)" if len(bundles) > 3 else "")
    raise InputError(f"{folder} is a student, not a bundle: {advice}{listed}")


def describe_file(folder: Path, path: str, role: typing.Any) -> BundleFile:
    """The BundleFile of the file `path` in `folder`."""
    full = folder / path
    return BundleFile(path=path, role=role, bytes=full.stat().st_size, sha256=sha256_file(full))


def utc_now() -> str:
    """The current time for a Measurement's `started`: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def require_measurable(folder: Path) -> None:
    """Refuse, before anything is measured, a model's folder in which the records cannot be written.

    Raises:
        InputError: it is read-only or cannot be written.
        NoSpace: the disk is full.
    """
    require_writable(folder, remedy="copy the model elsewhere, as its measurements are written into that folder")


def append_measurements(path: Path, measurements: Iterable[Measurement]) -> None:
    """Append records to a JSON-lines file atomically: readers see all or none, and concurrent writers lose none."""
    lines = [json.dumps(to_json(m), allow_nan=False) + "\n" for m in measurements]
    with turn(path.parent):
        old = read_bytes(path) if path.exists() else b""
        end = b"" if old.endswith(b"\n") or not old else b"\n"  # a file edited by hand may lack the last one
        write_bytes(path, old + end + "".join(lines).encode())


def load_measurements(path: Path) -> list[Measurement]:
    """Every record of a JSON-lines file.

    Raises:
        InputError: the file does not exist.
        ArtifactError: it cannot be read, or a line is not a measurement; the message has the line's number.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: run robx bench or robx eval first")
    return [_measurement(line, f"{path}, line {n}") for n, line in enumerate(read_bytes(path).splitlines(), start=1)]


def _measurement(line: bytes, where: str) -> Measurement:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ArtifactError(f"{where} is not valid JSON ({error}): remove the line") from error
    kind = value.get("kind") if isinstance(value, dict) else None
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ArtifactError(f"{where} is not a measurement: its kind is none of {', '.join(_KINDS)}; remove the line")
    return from_json(cls, value, where=where)
