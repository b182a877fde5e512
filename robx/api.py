"""robx from Python: a function for each command, with the same settings.

    from robx import api

    student = api.distill(teacher="dino_vits16", student="resnet18", data="images/", out="runs/r18", epochs=10)
    bundle = api.export(student, format="openvino", int8=True, data="images/")
    api.evaluate([student, bundle], data="images/", fidelity=True)
    api.bench(bundle)
    api.report(student, out="report.html")

    model = api.load(student)                 # the timm model with its weights
    with api.open(bundle) as exported:        # the exported model in its runtime
        embeddings = exported.embed("photos/")  # (N, D)

Paths may be `str` or `Path`, and start with "~". A call leaves the caller's random numbers as they were. Whatever is
wrong with the caller's input, an unknown or missing argument included, raises a child of `robx.errors.RobxError`, whose
message says what to do. Long calls show their progress on a terminal and in a notebook, and write it to the logger
"robx" elsewhere; `progress=None` switches that off. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

from robx.arguments import checked, home_expanded, naming_arguments
from robx.errors import CorruptImage, InputError
from robx.formats import Format
from robx.progress import Progress
from robx.random_state import kept_random_state
from robx.reporting import Reporting, Say, reporting

StrPath = str | os.PathLike[str]
_TOLERANCE = 0.01  # of preprocessed values

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import nn

    from robx.eval.report.render import Pages
    from robx.records import Bundle, Latency, Measurement, Preprocessing, Student
    from robx.runtime.session import Session
    from robx.ship.run import Shipped

    Images = StrPath | Image.Image | np.ndarray | Iterable[StrPath | Image.Image | np.ndarray]
else:
    Images = Any  # numpy and Pillow are not imported yet: `embed` checks its images itself


Record = TypeVar("Record", covariant=True)


@dataclass(frozen=True, repr=False)
class Artifact(Generic[Record]):
    """A folder that robx wrote, and the record in it. It can be used wherever a path can."""

    path: Path
    record: Record

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r})"  # a notebook shows it, and the record is long


@overload
def distill(*, student: str, data: StrPath, out: StrPath, **settings: Any) -> Artifact[Student]: ...


@overload
def distill(*, student: Sequence[str], data: StrPath, out: StrPath, **settings: Any) -> list[Artifact[Student]]: ...


@checked
@kept_random_state()
def distill(
    *,
    student: str | Sequence[str],
    data: StrPath,
    out: StrPath,
    image_member: str | None = None,
    teacher: str | None = None,
    teacher_weights: StrPath | None = None,
    targets: StrPath | None = None,
    objective: str | None = None,
    init: StrPath | None = None,
    recipe: StrPath | None = None,
    store_targets: StrPath | None = None,
    cache: StrPath | None = None,
    progress: Reporting = "auto",
    **settings: Any,
) -> Artifact[Student] | list[Artifact[Student]]:
    """Distil a teacher into a student, or into several at once.

    Args:
        student: a timm name, or several that share one teacher and one pass over the images.
        data: images: a folder, tar shards, IDX or CIFAR arrays.
        out: the run's folder; an unfinished run in it is resumed.
        image_member: which image of a tar sample to read when it has several, such as "rgb.jpg".
        teacher: a name from `robx teachers`, "timm:NAME", or "ema" for the base method without a teacher.
        teacher_weights: the teacher's full checkpoint; None downloads it.
        targets: a folder of stored targets, used instead of a teacher.
        objective: "dino", "ibot", "msn", "swav" or "kd"; None is the method that pretrained the teacher, else msn.
        init: initial weights of the student's trunk: a run, a file (timm, torchvision), or "pretrained"; None: random.
        recipe: "quick" for minutes on a CPU, "paper" (the default), or a TOML file with keys of the recipe.
        store_targets: a folder to write the teacher's targets to, for later runs.
        cache: downloads and fitted prototypes; None is $ROBX_CACHE or ~/.cache/robx.
        progress: "auto", a callable of (done, total, note), or None; see `robx.reporting`.
        **settings: any key of `robx.distill.recipes.Recipe` (epochs=10, batch_size=256, lr=1e-3, crop_size=160 or
            (height, width), ...; "none" switches an optional one off), which overrides the recipe file, and any field
            of `robx.distill.training.run.Options`, which does not change the result (device="cuda", workers=8,
            probe_every=5, fresh=True, ...). `robx recipe` lists the keys.

    Returns:
        The student's folder and its record; a list of them if `student` is a list.

    Raises:
        InputError: unknown names or keys, settings that contradict each other, or images that cannot be used.
        ArtifactError: a damaged checkpoint, run or targets folder.
        Interrupted: a signal stopped the run; its state is saved, and the same call continues.
    """
    from robx.distill.resolve import DistillSettings
    from robx.distill.train import distill
    from robx.records import load_student

    request = DistillSettings.of(
        student=student,
        data=data,
        out=out,
        image_member=image_member,
        teacher=teacher,
        teacher_weights=teacher_weights,
        targets=targets,
        objective=objective,
        init=init,
        recipe=recipe,
        store_targets=store_targets,
        cache=cache,
        **settings,
    )
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, only this one reports
    with _reporting(progress if first else None, distill) as (shown, say):
        folders = distill(request, progress=shown, say=say)
    made = [Artifact(folder, load_student(folder)) for folder in folders]
    return made[0] if isinstance(student, str) else made


@checked
@kept_random_state()
def export(
    student: StrPath,
    *,
    format: Format,
    int8: bool = False,
    fp16: bool = False,
    data: StrPath | None = None,
    test: StrPath | None = None,
    labels: StrPath | None = None,
    image_member: str | None = None,
    out: StrPath | None = None,
    head: StrPath | None = None,
    max_drop: float = 1.0,
    min_speedup: float = 1.0,
    opset: int = 20,
    batch: int | None = None,
    target: str = "local",
    uint8_input: bool = False,
    resize_in_graph: bool = False,
    input_layout: Literal["NCHW", "NHWC", "nchw", "nhwc"] = "NCHW",
    input_channels: Literal["RGB", "BGR", "rgb", "bgr"] = "RGB",
    size: int | str | tuple[int, int] | None = None,
    candidates: int | None = None,
    budget: float | None = None,
    calibration_images: int = 300,
    judging_images: int = 3000,
    heal: float | None = None,
    sensitivity: bool = False,
    force: bool = False,
    progress: Reporting = "auto",
) -> Artifact[Bundle]:
    """Export a student; an int8 or fp16 model ships only if it passes the gate.

    Args:
        student: a run's folder.
        format: "onnx", "openvino", "trt", "ort", "executorch", "litert", "coreml" or "ncnn".
        int8: search for an int8 model that is accurate and not slower.
        fp16: half-precision weights; inputs and outputs stay float32.
        data: images; calibration from their training split, judging from their test split. Needed for int8 and fp16.
        test: judging images, if `data` holds training images only.
        labels: a CSV file with a path and a label in each line, for images without class folders.
        image_member: which image of a tar sample to read when it has several, such as "rgb.jpg".
        out: the bundle's folder; None is STUDENT/FORMAT-PRECISION, with `size` STUDENT/FORMAT-PRECISION-SIZE.
        head: a linear classifier to append, as `evaluate(save_head=...)` writes it; adds the output logits.
        max_drop: the largest accuracy drop allowed, in percentage points.
        min_speedup: the smallest speed-up over fp32 and fp16 in the same runtime.
        opset: ONNX opset.
        batch: batch size; None is dynamic.
        target: the device: "local" or "arm64"; for trt also "rtx:sm86+sm89" or "jetson-orin".
        uint8_input: take uint8 pixels; the normalisation becomes part of the model.
        resize_in_graph: with `uint8_input`, take images of any size; the resize and crop become part of the model.
        input_layout: with `uint8_input`, the axes of the input: "NCHW", or "NHWC" as cameras give it.
        input_channels: with `uint8_input`, the order of the channels: "RGB", or "BGR" as OpenCV gives it.
        size: input size in pixels, 224 or (height, width); None is the size that the student was trained with.
        candidates: the largest number of int8 candidates to try.
        budget: seconds after which no further candidate is started.
        calibration_images: number of calibration images; fewer than 300 for demonstrations only.
        judging_images: the largest number of judging images; more of them can prove a smaller drop.
        heal: minutes of training weights that tolerate int8, without labels; candidates made from them are tried too.
        sensitivity: measure the cost of each layer in int8, for `robx inspect`.
        force: ship the best int8 or fp16 model even if it failed, marked FORCED.
        progress: "auto", a callable of (done, total, note), or None; see `robx.reporting`.

    Returns:
        The bundle's folder and its record. If no candidate passed the gate, a message says so, and `record.precision`
        is that of the float model that ships instead; `record.rungs` says why each candidate failed.

    Raises:
        InputError: settings that contradict each other, or images that cannot be used.
        ArtifactError: the student is damaged.
        MissingExtra: the format's converter is not installed; the message says how to install it.
    """
    from robx.export.build import ExportSettings
    from robx.export.build import export as build
    from robx.export.gate.gate import gate_error

    settings = ExportSettings.of(
        student=student,
        format=format,
        int8=int8,
        fp16=fp16,
        data=data,
        test=test,
        labels=labels,
        image_member=image_member,
        out=out,
        head=head,
        max_drop=max_drop,
        min_speedup=min_speedup,
        opset=opset,
        batch=batch,
        target=target,
        uint8_input=uint8_input,
        resize_in_graph=resize_in_graph,
        input_layout=input_layout,
        input_channels=input_channels,
        size=size,
        candidates=candidates,
        budget=budget,
        calibration_images=calibration_images,
        judging_images=judging_images,
        heal=heal,
        sensitivity=sensitivity,
        force=force,
    )
    with _reporting(progress, export) as (shown, say):
        bundle = build(settings, progress=shown, say=say)
        folder = settings.folder(bundle)
        if (error := gate_error(bundle, folder, most=candidates, budget=budget)) is not None:
            say(str(error))
    return Artifact(folder, bundle)


@checked
@kept_random_state()
def bench(
    bundles: StrPath | Sequence[StrPath],
    *,
    device: str = "local",
    profile: str = "quick",
    threads: int = 1,
    provider: str | None = None,
    precision_hint: Literal["f32", "f16", "bf16"] = "f32",
    processes: int | None = None,
    affinity: Sequence[int] | str | None = None,
    batch: int = 1,
    data: StrPath | None = None,
    image_member: str | None = None,
    runner: Literal["python", "native"] | None = None,
    python: str | None = None,
    emulated: bool = False,
    seed: int = 0,
    retries: int = 2,
    progress: Reporting = "auto",
) -> list[Latency]:
    """Measure latency and memory of bundles on a device, and verify their outputs.

    Args:
        bundles: one or more bundles' folders.
        device: "local", "ssh://[user@]host[:port]", "adb://serial" or "adb://host:port".
        profile: length of the run: "rapid", "quick", "standard" or "mlperf".
        threads: threads of one inference.
        provider: the runtime's device: "cpu", "cuda", "gpu", "npu"; None is the runtime's default. It never falls back.
        precision_hint: floating-point type to compute in, if the runtime offers a choice.
        processes: fresh processes for each bundle; None is the profile's number.
        affinity: CPU cores that the measured process may use, as [0, 1] or "4-7"; None allows all.
        batch: images in one inference; more than 1 measures offline throughput.
        data: images to run; None renders scenes.
        image_member: which image of a tar sample to read when it has several, such as "rgb.jpg".
        runner: the program that measures: "python", or "native", which needs no Python on the device; None is Python
            if the device has one.
        python: the Python command on the device.
        emulated: the processor is emulated: verify the outputs, but measure no latency.
        seed: seed for the order of the processes.
        retries: times that an UNSTABLE bundle is measured again, if the reason may pass.
        progress: "auto", a callable of (done, total, note), or None; see `robx.reporting`.

    Returns:
        One record for each bundle, in their order; it is also appended to the bundle's measurements.jsonl. Its values
        are in ms (p50, p90, p99, first, ...) and MB (peak_memory). Its verdict is VALID, UNSTABLE or INVALID.

    Raises:
        InputError: no bundle, or a setting that a bundle does not support.
        ArtifactError: a bundle is damaged.
        DeviceError: the device cannot be reached, or no process of any bundle succeeded.
    """
    from robx.runtime.bench.bench import bench
    from robx.runtime.bench.profiles import BenchSettings

    settings = BenchSettings.of(
        bundles=_paths(bundles),
        device=device,
        profile=profile,
        threads=threads,
        provider=provider,
        precision_hint=precision_hint,
        processes=processes,
        affinity=affinity,
        batch=batch,
        data=data,
        image_member=image_member,
        runner=runner,
        python=python,
        emulated=emulated,
        seed=seed,
        retries=retries,
    )
    with _reporting(progress, bench) as (shown, say):
        return bench(settings, progress=shown, say=say)


@checked
@kept_random_state()
def evaluate(
    models: StrPath | Sequence[StrPath],
    *,
    data: StrPath | None = None,
    test: StrPath | None = None,
    labels: StrPath | None = None,
    image_member: str | None = None,
    knn: bool = False,
    linear: bool = False,
    lowshot: str = "",
    lowshot_splits: StrPath | None = None,
    transfers: Sequence[str] = (),
    fidelity: bool = False,
    reference: StrPath | None = None,
    margin: float = 1.0,
    cached: bool = False,
    save_head: StrPath | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch: int = 64,
    cache: StrPath | None = None,
    no_cache: bool = False,
    progress: Reporting = "auto",
) -> list[Measurement]:
    """Evaluate students and bundles on labelled images.

    Args:
        models: one or more folders of runs or bundles.
        data: labelled images with a training split and, unless `test` is given, a test split.
        test: test images, if `data` holds training images only.
        labels: a CSV file with a path and a label per line, for `data` and `test`.
        image_member: the image to read from tar samples that have several, for example "rgb.jpg".
        knn: weighted k nearest neighbours; the default if no other protocol is chosen.
        linear: a linear classifier.
        lowshot: images per class and shares, for example "1,2,5,1%".
        lowshot_splits: a folder with the published lists of low-shot images.
        transfers: other data sets, each "NAME" or "NAME=FOLDER".
        fidelity: compare bundles with their fp32 student, with a non-inferiority verdict.
        reference: the student's folder, if it is not the bundle's parent.
        margin: accuracy drop that `fidelity` accepts, in percentage points.
        cached: train classifiers on features that are extracted once, without augmentation.
        save_head: where to write a linear classifier on the embedding, for `export(head=...)`.
        device: of the models and of kNN: "cpu", "cuda", or as the bundle's engine calls it; None is its default.
        threads: threads of the model; None uses all processors.
        batch: images in one run of the model.
        cache: folder for extracted features; None is robx's cache.
        no_cache: extract all features again, and keep none.
        progress: "auto", a callable of (done, total, note), or None; see `robx.reporting`.

    Returns:
        The records, which are also appended to measurements.jsonl in each model's folder. Accuracies are in %, with
        95 % intervals.

    Raises:
        InputError: images or folders that cannot be used.
        ArtifactError: a model is damaged.
        MissingExtra, DeviceError: a model cannot be opened or run.
    """
    from robx.eval.evaluate import EvalSettings, evaluate

    settings = EvalSettings.of(
        models=_paths(models),
        data=data,
        test=test,
        labels=labels,
        image_member=image_member,
        knn=knn,
        linear=linear,
        lowshot=lowshot,
        lowshot_splits=lowshot_splits,
        transfers=transfers,
        fidelity=fidelity,
        reference=reference,
        margin=margin,
        cached=cached,
        save_head=save_head,
        device=device,
        threads=threads,
        batch=batch,
        cache=cache,
        no_cache=no_cache,
    )
    with _reporting(progress, evaluate) as (shown, say):
        return list(evaluate(settings, progress=shown, say=say))


@checked
@kept_random_state()
def report(
    folders: StrPath | Sequence[StrPath],
    *,
    out: StrPath = "report.html",
    margin: float = 1.0,
    budgets: Sequence[float | str] = (),
) -> Pages:
    """Write one page that says what to deploy, from everything that was measured.

    Args:
        folders: one or more runs, bundles, or folders that contain some.
        out: the page, a name that ends in .html; the same figures are written beside it as .md and .json.
        margin: accuracy drop that a recommendation may have, in percentage points.
        budgets: p90 latency budgets to list by name: a number of ms for every device, or "DEVICE=MS" for those with
            DEVICE in their names. The page covers every other budget as well.

    Returns:
        The page as written: its title, which is the recommendation, and its html, markdown and json.

    Raises:
        InputError: no such folder, nothing of robx in it, or another file name.
    """
    from robx.eval.report.render import render

    with _reporting(None, report) as (_, say):  # it takes seconds, and may have to name damaged files
        return render(_paths(folders), out=Path(out), margin=margin, budgets=tuple(budgets), say=say)


# The functions that run the stages of a plan, by the names of its tables.
VERBS: Mapping[str, Callable[..., Any]] = {
    "distill": distill,
    "export": export,
    "eval": evaluate,
    "bench": bench,
    "report": report,
}


@checked
@kept_random_state()
def ship(plan: StrPath | Mapping[str, Any], *, fresh: bool = False, progress: Reporting = "auto") -> Shipped:
    """Distil, export, evaluate, measure and report, as a plan says; finished stages are reused.

    Args:
        plan: a TOML file, or the same nested tables: {"teacher": ..., "student": ..., "data": ..., "out": ...,
            "export": [{"format": "onnx", "int8": True}], ...}; see `robx.ship.plan`.
        fresh: run every stage again, distillation from its first step.
        progress: "auto", a callable of (done, total, note), or None; see `robx.reporting`.

    Returns:
        The folders, the report, and one line for each stage that failed or that a gate refused.

    Raises:
        InputError: a wrong key or value in the plan, or images that cannot be used.
        Interrupted: a signal stopped a stage; the same call continues.
        RobxError: the student could not be distilled, or the report not written.
    """
    from robx.ship.plan import make_plan, read_plan
    from robx.ship.run import run_plan

    chosen = make_plan(plan, where="the plan") if isinstance(plan, Mapping) else read_plan(Path(plan))
    with reporting(progress) as (shown, say):  # its lines name keys of the plan, and commands
        return run_plan(chosen, VERBS, fresh=fresh, progress=shown, announce=say, say=say)


@checked
@kept_random_state()
def load(run: StrPath) -> nn.Module:
    """Load a distilled student as the timm model that it is, for fine-tuning or for use in PyTorch.

    Args:
        run: a run's folder, as `distill` wrote it.

    Returns:
        The timm model with its weights, in eval mode, on the CPU, in float32. It maps pixels (N, 3, H, W) to the
        embedding (N, D); `model.reset_classifier(10)` gives it a new classifier. Its attribute `preprocessing` is a
        torchvision transform from a PIL image to a float32 tensor (3, H, W), with exactly robx's own pixels.

    Raises:
        InputError: `run` is not a run's folder.
        ArtifactError: the folder is damaged, or the weights do not fit the network.
    """
    folder = Path(run)
    if not (folder / "student.json").is_file():
        raise InputError(f"{folder} is not a student (it has no student.json): give a folder that robx distill wrote")
    from robx.images.transform import torchvision_transform
    from robx.trunk import load_trunk

    record, model = load_trunk(folder)
    model.preprocessing = torchvision_transform(record.preprocessing)
    return model


@contextlib.contextmanager
def _reporting(progress: Reporting, function: Callable[..., Any]) -> Iterator[tuple[Progress, Say]]:
    """As `reporting`; messages name the arguments of `function`."""
    with reporting(progress) as (shown, say):
        yield shown, lambda text: say(type(text)(naming_arguments(text, function)))  # a Fact stays one


def _paths(paths: StrPath | Iterable[StrPath]) -> tuple[Path, ...]:
    """One path or several."""
    found = (Path(paths),) if isinstance(paths, str | os.PathLike) else tuple(map(Path, paths))
    if not found:
        raise InputError("no folder was given: give at least one that robx wrote")
    return found


@checked
@kept_random_state()
def open(folder: StrPath, *, threads: int = 1, provider: str | None = None) -> Embedder:
    """Open a bundle in its runtime, or a student in PyTorch, to embed images.

    Args:
        folder: a bundle's or a run's folder.
        threads: threads of one inference.
        provider: the runtime's device: "cpu", "cuda", "gpu", "npu"; None is the runtime's default. It never falls back.

    Raises:
        InputError: `folder` is neither.
        ArtifactError: the folder is damaged or was tampered with.
        MissingExtra: the runtime is not installed; the message says how to install it.
        DeviceError: the runtime cannot run the model on this machine.
    """
    from robx.records import warn_outdated
    from robx.runtime.session import SessionSettings, open_session

    session = open_session(Path(folder), SessionSettings(threads=threads, provider=provider))
    with reporting(None) as (_, say):
        warn_outdated(Path(folder), session.bundle, say)
    return Embedder(session)


class Embedder:
    """An opened model. Use it as a context manager, or call `close`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def record(self) -> Bundle | Student:
        """What the folder's manifest.json or student.json says: format, precision, preprocessing, verdict, ..."""
        return self._session.bundle

    @checked
    def embed(self, images: Images, *, batch: int = 8) -> np.ndarray:
        """Embed images, one row each, in their order.

        Args:
            images: one item or an iterable of items. An item is a path (an image file, a folder of images or a tar
                shard, whose images come in the order of their names), a PIL image, or an array: uint8 (H, W),
                (H, W, 3) or (N, H, W, 3) pixels, which are preprocessed, or float32 (N, 3, H, W) pixels, which are
                preprocessed already.
            batch: images in one run of the model, at most.

        Returns:
            Embeddings, float32 (N, D).

        Raises:
            CorruptImage: an image cannot be decoded, in a folder as well: a row that is left out would shift all that
                follow. `robx run --out FILE.npz` skips such images and names the others.
            InputError: no image, a path that does not exist, an array of another type or shape or with NaN or infinity,
                or `batch` below 1.
            DeviceError: the engine failed, gave no output in time, or returned NaN or infinity.
        """
        import numpy as np

        from robx.runtime.infer import infer, infer_preprocessed

        items = _items(images)
        if not items:
            raise InputError("no image was given: give paths, PIL images or arrays")
        parts = [array for item in items if (array := _preprocessed(item)) is not None]
        if parts and len(parts) < len(items):
            raise InputError("preprocessed arrays (float32) and other images are mixed: embed them in two calls")
        if parts:
            with reporting(None) as (_, say):
                _check_pixels(parts, self._session.bundle.preprocessing, say)
            return np.concatenate([infer_preprocessed(self._session, part, batch=batch) for part in parts])
        answers = infer(self._session, _readers(items), batch=batch, on_skip=_refuse)
        return np.stack([answer for _, answer in answers])

    @checked
    def close(self) -> None:
        """Free the runtime's model; a second call does nothing."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _items(images: Any) -> list[Any]:
    """The items of `embed`'s images: one, or those of an iterable."""
    if isinstance(images, str | os.PathLike) or _is_image(images):
        return [images]
    if isinstance(images, bytes | bytearray | Mapping) or not isinstance(images, Iterable):
        raise InputError(
            f"images is of type {type(images).__name__}: give a path, a PIL image, an array or a list of these"
        )
    return list(images)


def _is_image(item: Any) -> bool:
    import numpy as np
    from PIL import Image

    return isinstance(item, np.ndarray | Image.Image)


def _preprocessed(item: Any) -> np.ndarray | None:
    """`item` when it is a float32 (N, 3, H, W) array; None for everything else."""
    import numpy as np

    if isinstance(item, np.ndarray) and item.ndim == 4 and item.dtype == np.float32:
        return item
    return None


def _check_pixels(arrays: Sequence[np.ndarray], preprocessing: Preprocessing, say: Say) -> None:
    """Refuse NaN and infinity in preprocessed images (N, 3, H, W), and warn of values that no image can have."""
    low, high = preprocessing.value_range
    for number, pixels in enumerate(arrays):
        least, greatest = (float(end) for end in (pixels.min(initial=low), pixels.max(initial=high)))
        if not math.isfinite(least) or not math.isfinite(greatest):
            raise InputError(f"array {number} contains NaN or infinity: give preprocessed pixels, or uint8 ones")
        if least < low - _TOLERANCE or greatest > high + _TOLERANCE:
            say(
                f"warning: array {number} has values from {least:.3g} to {greatest:.3g}, and preprocessed pixels of "
                f"this model are in {low:.3g} to {high:.3g}: normalise them, or give uint8 pixels"
            )


def _readers(items: Iterable[Any]) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """(name, read) of every image, as `infer` takes them; nothing is read yet."""
    import numpy as np

    from robx.runtime.infer import find_images

    for number, item in enumerate(items):
        if isinstance(item, str) and not item:
            raise InputError(f"image {number} is an empty path: give a path, or . for the current folder")
        if isinstance(item, str | os.PathLike):
            yield from find_images([Path(home_expanded(item))])
        elif not _is_image(item):
            raise InputError(
                f"image {number} is of type {type(item).__name__}: give a path, a PIL image or a numpy array"
            )
        elif isinstance(item, np.ndarray):
            yield from _readers_of_array(item, number)
        else:
            name = f"image {number}"
            yield name, lambda item=item, name=name: _upright_rgb(item, name)  # type: ignore[misc]


def _readers_of_array(pixels: np.ndarray, number: int) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    import numpy as np
    from PIL import Image

    one = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not pixels.size or not (one or (pixels.ndim == 4 and pixels.shape[3] == 3)):
        raise InputError(
            f"array {number} is {pixels.dtype} {pixels.shape}: give uint8 (H, W, 3) or (N, H, W, 3) pixels, "
            "or preprocessed ones as float32 (N, 3, H, W)"
        )
    for place, image in enumerate([pixels] if one else pixels):
        yield f"image {number + place}", lambda image=image: Image.fromarray(image).convert("RGB")  # type: ignore[misc]


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    from robx.images.decode import upright_rgb

    return upright_rgb(image, name=name)


def _refuse(error: CorruptImage) -> None:
    remedy = "leave it out, or let robx run --out FILE.npz skip such images and name the others"
    raise type(error)(f"{error}: {remedy}") from None
