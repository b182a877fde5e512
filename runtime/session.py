"""Session: an opened model, whichever engine runs it. `open_session` finds the engine in robx/formats.py."""

from __future__ import annotations

import importlib
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, Self

import numpy as np

from robx.errors import (
    ArtifactError,
    DeviceError,
    InputError,
    MissingExtra,
    RobxError,
    did_you_mean,
    first_line,
    is_exhausted,
)
from robx.formats import PROVIDERS, RUNTIMES
from robx.golden.sample import check_preprocessing
from robx.records import Bundle, Student, from_json, load_bundle, load_student, to_json
from robx.runtime.device.runner import run_in_batches
from robx.store.files import read_json
from robx.store.xml_safety import read_xml


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How a model is run. Nothing is left to the engine's defaults."""

    threads: int = 1  # intra-op threads; inter-op parallelism is always 1
    provider: str | None = None  # hardware backend: cpu, cuda, gpu, npu, ...; None: the engine's basic one
    precision_hint: Literal["f32", "f16", "bf16"] = "f32"  # floating-point type, where the engine has a choice
    batch: int | None = None  # images per call, if it never changes: an engine may optimise for it

    def __post_init__(self) -> None:
        """Reject "automatic" threads: a measurement without the number of threads cannot be compared."""
        if self.threads < 1:
            raise InputError(f"threads is {self.threads}: it must be at least 1")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch is {self.batch}: it must be at least 1")


def check_provider(name: str | None) -> None:
    """Raise InputError for a provider that no engine has, before a device is reached; "cuda:1" and "gpu.0" are some."""
    if name is not None and name.lower().partition(":")[0].partition(".")[0] not in PROVIDERS:
        hint = did_you_mean(name, PROVIDERS, otherwise=f"choose one of {', '.join(PROVIDERS)}")
        raise InputError(f"unknown provider {name!r}: {hint}")


RUN_SECONDS = 300.0  # longest wait for the output of one batch
_CANCEL_SECONDS = 10.0


class Model(Protocol):
    """What an engine file's ``open_model`` returns."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) of float32 (N, 3, H, W); N is the bundle's batch if that is fixed."""

    def facts(self) -> dict[str, Any]:
        """Engine, version, provider and threads that are actually in use."""

    def close(self) -> None:
        """Free the engine's resources."""

    # An engine that can stop a run in another thread also has ``cancel()``.


class Session(Protocol):
    """An opened Bundle or Student."""

    bundle: Bundle | Student

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W)."""

    def facts(self) -> dict[str, Any]:
        """Engine, version, provider and threads that are actually in use."""

    def close(self) -> None:
        """Free the engine's resources; a second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_session(path: str | Path, settings: SessionSettings | None = None, *, labels: bool = False) -> Session:
    """Open a Bundle's folder in its engine, or a Student's folder in torch.

    With `labels`, a bundle that has a classification head returns logits (N, C) instead of embeddings.

    Raises:
        InputError: `path` is neither a bundle nor a student.
        ArtifactError: the folder is damaged or was tampered with.
        MissingExtra: the engine is not installed; the message names the extra that installs it.
        DeviceError: the engine is installed but cannot run the model on this machine.
    """
    path, settings = Path(path), settings or SessionSettings()
    record = load_record(path)
    engine, name = engine_module(record), record.runtime if isinstance(record, Bundle) else "torch"
    try:
        if isinstance(record, Bundle):
            check_bundle(path, record)
        manifest = to_json(record)
        if labels and isinstance(record, Bundle):
            manifest["outputs"].sort(key=lambda output: output["name"] != "logits")  # engines return the first output
        model = engine.open_model(str(path), manifest, asdict(settings))
        if _read_record(path) != record:  # an export may replace the bundle at any moment
            model.close()
            raise ArtifactError(f"{path} was replaced while it was being opened: run the same command again")
    except RobxError:
        raise
    except ImportError as error:
        if is_exhausted(error):  # the package is there, but there is no memory to load it
            raise
        raise MissingExtra(name, extra_for(name), purpose=f"opening {path}", cause=error) from error
    except Exception as error:
        raise DeviceError(f"{path} cannot run on this machine: {first_line(error)}") from error
    return OpenModel(record, model, settings.batch, labels=labels)


def run_within(session: Session, images: np.ndarray, *, seconds: float | None = None) -> np.ndarray:
    """`session.run(images)` with a time limit (default: RUN_SECONDS); Ctrl-C and SIGTERM work while it runs.

    A model file may contain a loop that does not end, and an engine cannot be interrupted. It costs about 50
    microseconds per call, so timed calls do without.

    Raises:
        DeviceError: there was no output in time; the run was cancelled, where the engine can do that.
    """
    limit = RUN_SECONDS if seconds is None else seconds
    found: list[np.ndarray | BaseException] = []

    def work() -> None:
        try:
            found.append(session.run(images))
        except BaseException as error:  # raised below, in the caller's thread
            found.append(error)
        done.set()

    done = threading.Event()
    threading.Thread(target=work, daemon=True).start()
    try:
        late = not done.wait(limit)
    except BaseException:  # Ctrl-C or SIGTERM
        _cancel(session, done)
        raise
    if late:
        _cancel(session, done)
        raise DeviceError(f"the engine did not process {len(images)} images within {limit:g} s: check the model file")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _cancel(session: Session, done: threading.Event) -> None:
    """Stop the run and wait for its end, where the engine can: a process that ends while an engine runs may crash."""
    if isinstance(session, OpenModel) and session.cancel():
        done.wait(_CANCEL_SECONDS)


def load_record(path: str | Path) -> Bundle | Student:
    """The verified record of a Bundle's or a Student's folder.

    Raises:
        InputError: `path` is neither.
        ArtifactError: the folder is damaged or was tampered with.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return load_bundle(path)
    if (path / "student.json").is_file():
        return load_student(path)
    raise InputError(
        f"{path} is neither a bundle (manifest.json) nor a student (student.json): give a folder that robx wrote"
    )


def check_bundle(path: Path, bundle: Bundle) -> None:
    """Reject a hostile model file of the bundle in `path`, before a runtime opens it, and an edited preprocessing.

    The bundle's hashes do not tell: whoever made the bundle made them too.

    Raises:
        ArtifactError: ONNX with a tensor that is stored outside the file or that is not valid; XML that declares
            entities; a preprocessing that does not fit the golden sample.
    """
    check_preprocessing(path, bundle)
    model = path / bundle.model.path
    if model.suffix == ".onnx":
        importlib.import_module("robx.store.onnx_safety").load_checked(model)
    elif model.suffix == ".xml":
        read_xml(model)


def _read_record(path: Path) -> Bundle | Student:
    """The record as it is on disk now; the files are not verified again."""
    bundle, student = path / "manifest.json", path / "student.json"
    if bundle.is_file():
        return from_json(Bundle, read_json(bundle), where=str(bundle))
    return from_json(Student, read_json(student), where=str(student))


def engine_module(record: Bundle | Student) -> ModuleType:
    """The engine file that runs a bundle, or a student in torch.

    Raises:
        ArtifactError: robx cannot run this format (Core ML runs on Apple systems only).
    """
    if isinstance(record, Student):
        return importlib.import_module("robx.runtime.engines.on_torch")
    runtime = RUNTIMES.get(record.runtime)
    if runtime is None or runtime.engine is None:
        raise ArtifactError(
            f"robx has no engine {record.runtime!r} for a bundle of format {record.format}: run it in another tool"
        )
    return importlib.import_module(f"robx.runtime.engines.{runtime.engine}")


def extra_for(runtime: str) -> str:
    """The extra of robx that installs an engine; "all" for those installed with robx itself."""
    return (RUNTIMES[runtime].extra if runtime in RUNTIMES else None) or "all"


class OpenModel:
    """The Session of every engine: validates inputs, and splits them where the batch is fixed."""

    def __init__(
        self, record: Bundle | Student, model: Model, batch: int | None = None, *, labels: bool = False
    ) -> None:
        self.bundle = record
        self._model: Model | None = model
        shape = record.inputs[0].shape if isinstance(record, Bundle) else (None, 3, *record.preprocessing.shape)
        inside = record.in_model if isinstance(record, Bundle) else None
        self._batch, self._image_shape = shape[0] or batch, shape[1:]
        if inside is not None and inside.layout == "NHWC":  # a session takes NCHW whatever the model's axes are
            self._image_shape = (shape[3], *shape[1:3])
        self._widths = _output_widths(record, labels=labels)

    @property
    def takes_pixels(self) -> bool:
        """Whether `run` also takes uint8 pixels (N, H, W, 3), which it normalises on its device."""
        return bool(getattr(self._model, "takes_pixels", False))

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (N, D), of preprocessed images, float32 (N, 3, H, W), or of pixels; see `takes_pixels`.

        Raises:
            InputError: the dtype or shape is not the model's.
            DeviceError: the session is closed, or the engine failed.
        """
        if self._model is None:
            raise DeviceError("the session is closed: open it again")
        pixels = images.dtype == np.uint8 and self.takes_pixels
        shape = (*self._image_shape[1:], self._image_shape[0]) if pixels else self._image_shape
        fits = images.ndim == 4 and all(
            want in (None, have) for want, have in zip(shape, images.shape[1:], strict=True)
        )
        if not (pixels or images.dtype == np.float32) or not fits or not len(images):
            expected = ("N", *self._image_shape)
            raise InputError(f"images are {images.dtype} {images.shape}, but the model takes float32 {expected}")
        try:
            output: np.ndarray = run_in_batches(self._model, images, self._batch, self._widths)
            return output
        except Exception as error:
            raise DeviceError(f"the engine failed on a batch of {len(images)}: {first_line(error)}") from error

    def facts(self) -> dict[str, Any]:
        """Engine, version, provider and threads that are actually in use."""
        if self._model is None:
            raise DeviceError("the session is closed: open it again")
        return self._model.facts()

    def cancel(self) -> bool:
        """Stop a run in another thread; False where the engine cannot."""
        cancel = getattr(self._model, "cancel", None)
        if cancel is None:
            return False
        cancel()
        return True

    def close(self) -> None:
        """Free the engine's resources; a second call does nothing."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _output_widths(record: Bundle | Student, *, labels: bool) -> set[int]:
    """The widths that an output of the model may have.

    With `labels` that of any output: an engine that cannot return the logits returns the embedding.
    """
    if isinstance(record, Student):
        return {record.width}
    outputs = record.outputs if labels else record.outputs[:1]
    return {spec.shape[-1] or record.student.width for spec in outputs}
