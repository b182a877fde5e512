"""export(settings) -> Bundle: the whole export, from a student's folder to a judged bundle.

fp32 ships when its embeddings are PyTorch's. fp16 and int8 have to pass the gate on held-out real images; when no
candidate of the requested precision passes, the best float model ships instead, under its true precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robx.errors import InputError
from robx.export.bundle_folder import describe_existing, require_bundle_place, ship, supersede
from robx.export.cache import Cache
from robx.export.formats.network import export_model, tensor_specs, trunk_at_size
from robx.export.gate import gate
from robx.export.gate.decide import Decision, decide
from robx.export.gate.front import with_front
from robx.export.gate.golden import golden_sample
from robx.export.gate.judge import Judge
from robx.export.gate.timing import Timer
from robx.export.heal.heal import HealSettings
from robx.export.image_splits import (
    JUDGING_IMAGES,
    MIN_IMAGES,
    MIN_JUDGING,
    SCREENING_IMAGES,
    Splits,
    SplitSizes,
    open_data,
    read_splits,
)
from robx.export.make import CandidateBuilder, Networks
from robx.export.request import DEFAULT_OPSET, ExportRequest, ExportTarget
from robx.formats import FORMATS
from robx.image_size import at_size, parse_size
from robx.linear_head import load_head
from robx.progress import Progress, silent
from robx.records import Bundle, Preprocessing, Rung, load_bundle, load_student, unfinished
from robx.store.files import sha256_file
from robx.store.folders import require_replaceable, scratch_folder
from robx.trunk import load_trunk

CACHE = "export-cache"  # in the student's folder


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What ``robx export`` and ``robx.api.export`` take.

    Raises:
        InputError: settings that do not fit each other.
    """

    run: Path  # folder that robx distill wrote
    target: ExportTarget
    data: Path | None = None  # images; calibration from train/, judging from test/. Needed for fp16 and int8
    test: Path | None = None  # judging images, where `data` has training images only
    labels: Path | None = None  # CSV file with a path and a label in each line, for images without class folders
    image_member: str | None = None  # image of a tar sample that has several, such as "rgb.jpg"
    out: Path | None = None  # the bundle's folder; default: see `folder`
    head: Path | None = None  # linear head to append (safetensors)
    limits: gate.Limits = field(default_factory=gate.Limits)
    candidates: int | None = None  # int8 candidates to try; None: all
    budget: float | None = None  # seconds after which no further candidate is started
    force: bool = False  # ship the best int8 or fp16 model even if it failed the gate
    heal: HealSettings | None = None  # train weights that tolerate int8, and try them too
    sensitivity: bool = False  # of int8: measure each layer's cost even where no candidate needs it
    calibration_images: int = MIN_IMAGES
    judging_images: int = JUDGING_IMAGES

    def __post_init__(self) -> None:
        if self.test is not None and self.data is None:
            raise InputError("--test gives judging images, and calibration needs others: give --data too")
        for name, given in (("labels", self.labels), ("image-member", self.image_member)):
            if given is not None and self.data is None:
                raise InputError(f"--{name} is about images, and there are none: give --data too")
        if self.target.precision != "fp32" and self.data is None:
            raise InputError(f"an {self.target.precision} export is judged on real images: give --data")
        if self.heal is not None and self.target.precision != "int8":
            raise InputError("--heal is for int8: give --int8 too")
        if self.sensitivity and self.data is None:
            raise InputError("--sensitivity is measured on real images: give --data")
        if self.candidates is not None and self.candidates < 1:
            raise InputError(f"--rungs must be at least 1, got {self.candidates}")
        if self.budget is not None and not 0 <= self.budget < math.inf:
            raise InputError(f"--budget must be a number of seconds of at least 0, got {self.budget:g}")
        if self.calibration_images < 1:
            raise InputError(f"--calibration-images must be at least 1, got {self.calibration_images}")
        if self.judging_images < MIN_JUDGING:
            raise InputError(f"--judging-images must be at least {MIN_JUDGING}, got {self.judging_images}")

    def refuse_ignored(self) -> None:
        """Refuse what was given for candidates, a gate or an ONNX file that this export does not have.

        Separate from the other checks: a program that exports one student in several precisions may use the same
        settings for all of them, while an option that somebody gave for one export and that has no effect is a mistake.

        Raises:
            InputError: the message names the options.
        """
        precision, limits = self.target.precision, gate.Limits()
        if self.target.opset != DEFAULT_OPSET and not FORMATS[self.target.format].takes_opset:
            made = ", ".join(name for name, row in FORMATS.items() if row.takes_opset)
            raise InputError(f"--opset is for formats made from ONNX ({made}), not for {self.target.format}: drop it")
        if precision != "int8":
            searching = {"--rungs": self.candidates is not None, "--budget": self.budget is not None}
            _refuse(searching, "the int8 search", "--int8")
            _refuse({"--sensitivity": self.sensitivity}, "the layers of an int8 export", "--int8")
        if precision == "fp32":
            judging = {
                "--max-drop": self.limits.max_drop != limits.max_drop,
                "--min-speedup": self.limits.min_speedup != limits.min_speedup,
                "--force": self.force,
            }
            _refuse(judging, "the gate, which judges int8 and fp16", "--int8 or --fp16")
            images = {
                "--labels": self.labels is not None,
                "--calibration-images": self.calibration_images != MIN_IMAGES,
                "--judging-images": self.judging_images != JUDGING_IMAGES,
            }
            _refuse(images, "int8 and fp16", "--int8 or --fp16")

    @classmethod
    def of(cls, **values: Any) -> ExportSettings:
        """Settings from the keywords of ``robx.api.export``; a path may be a string.

        Raises:
            InputError: settings that do not fit each other, or that this export would ignore.
        """
        values = {n: Path(value) if n in _PATHS and value is not None else value for n, value in values.items()}
        int8, fp16 = values.pop("int8", False), values.pop("fp16", False)
        if int8 and fp16:
            raise InputError("fp16 and int8 are two different exports: give one of them")
        values |= {name: values[name].upper() for name in ("input_layout", "input_channels") if name in values}
        size, heal = values.pop("size", None), values.pop("heal", None)
        target = ExportTarget(
            precision="int8" if int8 else "fp16" if fp16 else "fp32",
            device=values.pop("target", "local"),
            size=None if size is None else parse_size(size, name="size"),
            **{name: values.pop(name) for name in _OF_TARGET & set(values)},
        )
        limits = gate.Limits(**{name: values.pop(name) for name in _OF_LIMITS & set(values)})
        healing = None if heal is None else HealSettings(minutes=heal)
        settings = cls(run=values.pop("student"), target=target, limits=limits, heal=healing, **values)
        settings.refuse_ignored()
        return settings

    @property
    def requested_folder(self) -> Path:
        """Where the bundle is written if the requested precision passes the gate."""
        return self._folder(self.target.format, self.target.precision)

    @property
    def possible_folders(self) -> tuple[Path, ...]:
        """Where a bundle may be written: as requested, or as the float model that ships if no candidate passes."""
        precisions = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "int8": ("int8", "fp16", "fp32")}
        return tuple(self._folder(self.target.format, one) for one in precisions[self.target.precision])

    def same_float_model(self, other: ExportSettings) -> bool:
        """Whether both make the same model but for its precision."""
        plain = [dataclasses.replace(one.target, precision="fp32") for one in (self, other)]
        return plain[0] == plain[1] and (self.run, self.head) == (other.run, other.head)

    @property
    def sizes(self) -> SplitSizes:
        """How many images the export reads; parity of an fp32 model takes only 16."""
        if self.target.precision == "fp32" and not self.sensitivity:
            return SplitSizes(calibration=16, bank=16, screening=0, judging=64, least=16)
        return SplitSizes(
            calibration=self.calibration_images,
            screening=SCREENING_IMAGES,
            judging=self.judging_images,
            least=self.calibration_images,
        )

    def folder(self, bundle: Bundle) -> Path:
        """Where `bundle` was written: `out`, or ``<run>/<format>-<true precision>``, with a size other than trained."""
        return self._folder(bundle.format, bundle.precision)

    def _folder(self, form: str, precision: str) -> Path:
        size = "" if self.target.size is None else f"-{'x'.join(map(str, dict.fromkeys(self.target.size)))}"
        return self.out or self.run / f"{form}-{precision}{size}"


def _refuse(given: Mapping[str, bool], what_for: str, remedy: str) -> None:
    """Raise InputError if options were given for what this export does not do."""
    if names := [name for name, is_given in given.items() if is_given]:
        verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
        raise InputError(f"{', '.join(names)} {verb} for {what_for}: add {remedy}, or leave {them} out")


_PATHS = {"student", "data", "test", "labels", "out", "head"}
_OF_TARGET = {"format", "batch", "opset", "uint8_input", "resize_in_graph", "input_layout", "input_channels"}
_OF_LIMITS = {"max_drop", "min_speedup"}


def export(
    settings: ExportSettings,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
    on_candidate: Callable[[Rung], None] | None = None,
) -> Bundle:
    """Export a student and write the bundle's folder, as a whole or not at all.

    Args:
        settings: what to export, to what, and how it is judged.
        progress: called with (done, total, note).
        say: called with a line about whatever was left out, computed again or done otherwise than asked.
        on_candidate: called with every candidate as soon as it is judged.

    Returns:
        The bundle as written to ``settings.folder(bundle)``. Its `precision` is the true one and `requested` the one
        that was asked for.

    Raises:
        RobxError: nothing is written then.
    """
    _refuse_bundle(settings.run)
    require_places(settings)
    request, networks = _prepare(settings)
    if interrupted := unfinished(request.student):
        say(f"warning: {settings.run}: {interrupted}")
    splits = _read_images(settings, request.student.preprocessing, progress, say)
    if settings.target.precision == "int8" and settings.calibration_images < MIN_IMAGES:
        say(
            f"warning: {settings.calibration_images} calibration images are for a demonstration only: the extremes of "
            f"the activations are left to chance below {MIN_IMAGES}"
        )
    progress(0, 1, "exporting to ONNX")
    with _cache_folder(settings, say) as cache, scratch_folder(cache, "work") as scratch:
        builder = CandidateBuilder(
            request,
            networks,
            splits=splits,
            scratch=scratch,
            cache=Cache(cache, say),
            heal_settings=settings.heal,
            progress=progress,
            say=say,
        )
        bundle, folder = with_front(builder, *_decide(settings, builder, on_candidate))
        if settings.sensitivity:
            builder.student.layer_costs()
        out = settings.folder(bundle)
        replaced = describe_existing(out)
        progress(0, 1, "recording the golden sample")
        sample = golden_sample(builder, bundle, folder)
        bundle = ship(bundle, folder, out, sample=sample, layer_costs=builder.student.measured_costs)
        if replaced:
            say(f"{out}: {bundle.id} replaced {replaced}")
        if warning := supersede(settings.requested_folder, by=out):
            say(warning)
        return bundle


def _decide(
    settings: ExportSettings, builder: CandidateBuilder, on_candidate: Callable[[Rung], None] | None
) -> tuple[Bundle, Path]:
    """The record of what ships, and the scratch folder that holds its files."""
    with Timer(builder, settings.limits) as timer:
        return decide(
            Decision(
                judge=Judge(builder, settings.limits),
                timer=timer,
                most=settings.candidates,
                budget=settings.budget,
                force=settings.force,
                told=lambda trial: on_candidate(trial.record()) if on_candidate is not None else None,
            )
        )


def _prepare(settings: ExportSettings) -> tuple[ExportRequest, Networks]:
    """The student's networks for the size that is exported, and the request that describes them."""
    target = settings.target
    student, trunk = load_trunk(settings.run)
    trained = student.preprocessing
    student = dataclasses.replace(student, preprocessing=at_size(trained, target.size))
    trunk = trunk_at_size(trunk, student)
    head = load_head(settings.head) if settings.head else None
    labels = head.labels if head else None
    model = export_model(trunk, student, head=head, uint8_input=target.uint8_input)
    inputs, outputs = tensor_specs(
        student, batch=target.batch, uint8_input=target.uint8_input, labels=len(labels) if labels else None
    )
    rewrites = model.rewrites
    if student.preprocessing != trained:
        now, before = (f"{height} x {width}" for height, width in (student.preprocessing.shape, trained.shape))
        rewrites = (*rewrites, f"exported for {now} pixels, trained with {before}")
    request = ExportRequest(
        target=target, student=student, inputs=inputs, outputs=outputs, labels=labels, rewrites=rewrites
    )
    return request, Networks(trunk, model, sha256_file(settings.head) if settings.head else None)


def require_places(settings: ExportSettings) -> None:
    """Refuse, before minutes of work, folders in which the bundle cannot be written: whichever precision ships.

    Raises:
        InputError: the message names the folder.
        NoSpace: the disk is full.
    """
    if settings.out is None and not settings.run.is_dir():
        return  # that is refused as a run
    remedy = "give --out in another folder" if settings.out is not None else "give --out with a folder for the bundle"
    for folder in dict.fromkeys(settings.possible_folders):
        require_replaceable(folder, remedy=remedy)
        require_bundle_place(folder)


@contextlib.contextmanager
def _cache_folder(settings: ExportSettings, say: Callable[[str], None]) -> Iterator[Path]:
    """Where computed files are kept: in the run or, if that is read-only, in a temporary folder."""
    cache = settings.run / CACHE
    if os.access(cache if cache.is_dir() else settings.run, os.W_OK | os.X_OK):
        yield cache
        return
    say(f"{settings.run} is read-only: nothing is kept there for the next export")
    with tempfile.TemporaryDirectory(prefix="robx-") as folder:
        yield Path(folder)


def _read_images(
    settings: ExportSettings, preprocessing: Preprocessing, progress: Progress, say: Callable[[str], None]
) -> Splits | None:
    """The images of an export; None without --data."""
    if settings.data is None:
        return None
    source, held_out = open_data(
        settings.data, settings.test, labels=settings.labels, image_member=settings.image_member
    )
    for note in dict.fromkeys(each.note for each in (source, held_out) if each is not None and each.note):
        say(note)
    return read_splits(source, held_out, preprocessing, sizes=settings.sizes, progress=progress, say=say)


def _refuse_bundle(run: Path) -> None:
    """Raise InputError where the user gave a bundle, with the run that it was exported from where that is known."""
    if not (run / "manifest.json").is_file() or (run / "student.json").exists():
        return
    bundle = load_bundle(run)
    made = f"{run} is a bundle ({bundle.format} {bundle.precision}), which is exported already"
    parent = run.resolve().parent
    if (parent / "student.json").is_file() and load_student(parent).sha256 == bundle.student.sha256:
        raise InputError(f"{made}: export its run instead: {run.parent if run.parent.name else parent}")
    raise InputError(f"{made}: give the run of the {bundle.student.timm_name} that it was exported from")
