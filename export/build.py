"""build(student, target) -> Bundle: the whole export, from a student's folder to a judged bundle.

fp32 ships when it answers as PyTorch does. fp16 and int8 have to pass the gate on held-out real images; when none of
what was asked for passes, the best float model ships instead, under its true precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from robx.errors import InputError
from robx.export.bundle_folder import CACHE, cached_onnx, require_bundle_place, ship
from robx.export.formats import to_onnx
from robx.export.gate import gate
from robx.export.gate.decide import Decision, decide
from robx.export.gate.judge import Judge
from robx.export.gate.timing import Timer
from robx.export.image_splits import JUDGING_IMAGES, MIN_IMAGES, SCREENING_IMAGES, Splits, read_splits
from robx.export.make import Workshop
from robx.export.request import ExportRequest, ExportTarget
from robx.images.sources import ImageSource
from robx.linear_head import load_head
from robx.progress import Progress, silent
from robx.records import Bundle, Preprocessing, Rung, load_student
from robx.store.files import sha256_file
from robx.store.folders import scratch_folder
from robx.trunk import load_trunk


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an export is judged, and how long it may look for a passing candidate."""

    limits: gate.Limits = field(default_factory=gate.Limits)
    rungs: int | None = None  # int8 candidates to try; None: all
    budget: float | None = None  # seconds after which no further rung begins
    force: bool = False  # ship the best int8 although it failed
    sensitivity: bool = False  # measure each layer's cost in int8 even where no rung needs it, for `robx inspect`
    calibration_images: int = MIN_IMAGES
    judging_images: int = JUDGING_IMAGES


def build(
    student_folder: Path,
    target: ExportTarget,
    *,
    source: ImageSource | None = None,
    judge: ImageSource | None = None,
    out: Path | None = None,
    head: Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    on_rung: Callable[[Rung], None] | None = None,
) -> Bundle:
    """Export a student and write the bundle's folder, whole or not at all.

    Args:
        student_folder: what ``robx distill`` wrote.
        target: format, precision, device, batch, opset.
        source: training images; calibration and the bank come from them. Needed for fp16 and int8.
        judge: held-out images; without them a part of `source` is held out.
        out: the bundle's folder; default ``<student_folder>/<format>-<true precision>``.
        head: a linear head to append (safetensors).
        options: limits of the gate and of the search.
        progress: told (done, total, note).
        on_rung: told of every rung as it is judged.

    Returns:
        The bundle as written. Its `precision` is the true one; `requested` tells what was asked for.

    Raises:
        RobxError: nothing is written then.
    """
    options, progress = options or Options(), progress or silent
    if target.precision != "fp32" and source is None:
        raise InputError(f"an {target.precision} export is judged on real images: give --data, or drop the precision")
    if options.sensitivity and source is None:
        raise InputError("--sensitivity is measured on real images: give --data")
    if out is not None:
        require_bundle_place(out)
    record = load_student(student_folder)
    splits = _read(source, judge, record.preprocessing, target, options, progress)
    student, trunk = load_trunk(student_folder)
    linear = load_head(head) if head else None
    model = to_onnx.export_model(trunk, student, head=linear, uint8_input=target.uint8_input)
    inputs, outputs = to_onnx.tensor_specs(
        student,
        batch=target.batch,
        uint8_input=target.uint8_input,
        labels=len(linear.labels) if linear else None,
    )
    request = ExportRequest(
        target=target, student=student, inputs=inputs, outputs=outputs, labels=linear.labels if linear else None
    )
    progress(0, 1, "exporting to ONNX")
    cached = cached_onnx(student_folder, model, request, head=sha256_file(head) if head else None)
    with scratch_folder(student_folder / CACHE, "work") as scratch:
        workshop = Workshop(
            request, model, cached, splits=splits, scratch=scratch, cache=student_folder / CACHE, progress=progress
        )
        with Timer(workshop, options.limits) as timer:
            bundle, folder = decide(
                Decision(
                    judge=Judge(workshop, options.limits),
                    timer=timer,
                    most=options.rungs,
                    budget=options.budget,
                    force=options.force,
                    told=lambda trial: on_rung(trial.record()) if on_rung is not None else None,
                )
            )
        if options.sensitivity:
            _ = workshop.layer_costs
        out = out or student_folder / f"{target.format}-{bundle.precision}"
        return ship(bundle, folder, out, layer_costs=workshop.__dict__.get("layer_costs"))


def _read(
    source: ImageSource | None,
    judge: ImageSource | None,
    preprocessing: Preprocessing,
    target: ExportTarget,
    options: Options,
    progress: Progress,
) -> Splits | None:
    if source is None:
        return None
    quick = target.precision == "fp32" and not options.sensitivity  # parity takes sixteen images and no bank
    return read_splits(
        source,
        judge,
        preprocessing,
        calibration_images=16 if quick else options.calibration_images,
        bank_images=16 if quick else 1000,
        screening_images=0 if quick else SCREENING_IMAGES,
        judging_images=64 if quick else options.judging_images,
        least=16 if quick else options.calibration_images,
        progress=progress,
    )
