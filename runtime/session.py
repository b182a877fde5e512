"""Session: one opened model, whatever runs it. `open_session` is the visible match from a bundle to its engine."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from robx.errors import ArtifactError, DeviceError, InputError, MissingExtra, RobxError, first_line
from robx.records import Bundle, Student, from_json, load_bundle, load_student, to_json
from robx.runtime.device.runner import run_in_batches
from robx.store.files import read_json


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How a model is run. Nothing is left to the engine's own choice."""

    threads: int = 1  # within one operator; between operators there is always one
    provider: str | None = None  # the engine's device: cpu, cuda, gpu, npu, ...; None is the engine's plainest
    precision_hint: Literal["f32", "f16", "bf16"] = "f32"  # what floats compute in, where an engine may choose
    batch: int | None = None  # images of every call, where that is always the same: an engine may plan for it

    def __post_init__(self) -> None:
        """Refuse "automatic" threads: a figure without them says nothing."""
        if self.threads < 1:
            raise InputError(f"threads is {self.threads}: give the number of threads, 1 or more")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch is {self.batch}: give 1 or more")


class Model(Protocol):
    """What an engine file's ``open_model`` returns."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) of float32 (N, 3, H, W); N is the bundle's batch where that is fixed."""

    def facts(self) -> dict[str, Any]:
        """Engine, version, provider, threads, as they really are."""

    def close(self) -> None:
        """Free what it holds."""


class Session(Protocol):
    """An opened Bundle or Student."""

    bundle: Bundle | Student

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""

    def facts(self) -> dict[str, Any]:
        """Engine, version, provider, threads, as they really are."""

    def close(self) -> None:
        """Free what it holds; a second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_session(path: Path, settings: SessionSettings | None = None, *, labels: bool = False) -> Session:
    """Open a Bundle's folder in its engine, or a Student's folder in torch.

    With `labels`, a bundle that has a head answers with its logits (N, C) in the embedding's place.

    Raises:
        InputError: `path` is neither.
        ArtifactError: damaged or tampered with.
        MissingExtra: the engine is not installed; the message has the extra that brings it.
        DeviceError: the engine is there and cannot run the model on this machine.
    """
    settings = settings or SessionSettings()
    record = load_record(path)
    if isinstance(record, Student):
        engine, name = importlib.import_module("robx.runtime.engines.on_torch"), "torch"
    else:
        engine, name = engine_module(record), record.runtime
    try:
        if isinstance(record, Bundle):
            check_onnx(path, record)
        manifest = to_json(record)
        if labels and isinstance(record, Bundle):
            manifest["outputs"].sort(key=lambda output: output["name"] != "logits")  # engines give the first
        model = engine.open_model(str(path), manifest, asdict(settings))
        if _read_record(path) != record:  # an export may put another bundle there at any moment
            model.close()
            raise ArtifactError(f"{path} was written anew while it was opened: run the same command again")
    except RobxError:
        raise
    except ImportError as error:
        raise MissingExtra(name, extra_for(name), purpose=f"opening {path}", cause=error) from error
    except Exception as error:
        raise DeviceError(f"{path} cannot be run here: {first_line(error)}") from error
    return OpenModel(record, model, settings.batch)


def load_record(path: Path) -> Bundle | Student:
    """The verified record of a Bundle's or a Student's folder.

    Raises:
        InputError: `path` is neither.
        ArtifactError: damaged or tampered with.
    """
    if (path / "manifest.json").is_file():
        return load_bundle(path)
    if (path / "student.json").is_file():
        return load_student(path)
    raise InputError(
        f"{path} is neither a bundle (manifest.json) nor a student (student.json): give one that robx wrote"
    )


def check_onnx(path: Path, bundle: Bundle) -> None:
    """Refuse ONNX that reaches outside of the bundle in `path`, before a runtime follows it; hashes do not tell.

    Raises:
        ArtifactError: a tensor that is stored elsewhere, or no valid ONNX.
    """
    if bundle.model.path.endswith(".onnx"):
        importlib.import_module("robx.store.onnx_safety").load_checked(path / bundle.model.path)


def _read_record(path: Path) -> Bundle | Student:
    """The record as it stands there now; the files are not verified again."""
    bundle, student = path / "manifest.json", path / "student.json"
    if bundle.is_file():
        return from_json(Bundle, read_json(bundle), where=str(bundle))
    return from_json(Student, read_json(student), where=str(student))


def engine_module(bundle: Bundle) -> ModuleType:
    """The engine file that runs `bundle`.

    Raises:
        ArtifactError: robx cannot run this format (Core ML runs on Apple's systems only).
    """
    match bundle.runtime:
        case "onnxruntime":
            return importlib.import_module("robx.runtime.engines.on_onnxruntime")
        case "openvino":
            return importlib.import_module("robx.runtime.engines.on_openvino")
        case "tensorrt" | "tensorrt_rtx":
            return importlib.import_module("robx.runtime.engines.on_tensorrt")
        case "executorch":
            return importlib.import_module("robx.runtime.engines.on_executorch")
        case "litert":
            return importlib.import_module("robx.runtime.engines.on_litert")
        case "ncnn":
            return importlib.import_module("robx.runtime.engines.on_ncnn")
        case other:
            raise ArtifactError(
                f"robx has no engine {other!r} for a bundle of format {bundle.format}: run it elsewhere"
            )


def extra_for(runtime: str) -> str:
    """The extra of robx that brings an engine; the engines of the core come with "robx[all]" too."""
    return {
        "openvino": "openvino",
        "tensorrt": "trt",
        "tensorrt_rtx": "trt-rtx",
        "executorch": "executorch",
        "litert": "litert",
        "ncnn": "ncnn",
    }.get(runtime, "all")


class OpenModel:
    """The Session of any engine: checks the input once, and splits it where the batch is fixed."""

    def __init__(self, record: Bundle | Student, model: Model, batch: int | None = None) -> None:
        self.bundle = record
        self._model: Model | None = model
        crop = record.preprocessing.crop
        shape = record.inputs[0].shape if isinstance(record, Bundle) else (None, 3, crop, crop)
        self._batch, self._image_shape = shape[0] or batch, shape[1:]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W).

        Raises:
            InputError: another dtype or shape.
            DeviceError: the session is closed, or the engine failed.
        """
        if self._model is None:
            raise DeviceError("the session is closed: open it again")
        fits = images.ndim == 4 and all(
            want in (None, have) for want, have in zip(self._image_shape, images.shape[1:], strict=True)
        )
        if images.dtype != np.float32 or not fits or not len(images):
            expected = ("N", *self._image_shape)
            raise InputError(f"images are {images.dtype} {images.shape} and the model takes float32 {expected}")
        try:
            answer: np.ndarray = run_in_batches(self._model, images, self._batch)
            return answer
        except Exception as error:
            raise DeviceError(f"the engine failed on a batch of {len(images)}: {first_line(error)}") from error

    def facts(self) -> dict[str, Any]:
        """Engine, version, provider, threads, as they really are."""
        if self._model is None:
            raise DeviceError("the session is closed: open it again")
        return self._model.facts()

    def close(self) -> None:
        """Free the engine's model; a second call does nothing."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
