"""build(student, target) -> Bundle: the whole export, from a student's folder to a judged bundle.

fp32 ships when it answers as PyTorch does. fp16 and int8 have to pass the gate on held-out real images; when none of
what was asked for passes, the best float model ships instead, under its true precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robx.errors import InputError
from robx.export.bundle_folder import CACHE, cached_onnx, require_bundle_place, ship
from robx.export.formats import to_onnx
from robx.export.gate import gate
from robx.export.gate.judge import Judge
from robx.export.gate.search import Outcome, climb, ships
from robx.export.image_splits import JUDGING_IMAGES, MIN_IMAGES, SCREENING_IMAGES, Splits, read_splits
from robx.export.int8.candidate import Candidate
from robx.export.int8.ladder import ladder, limit, machine_of, sensitive_rungs
from robx.export.make import Workshop
from robx.export.request import ExportRequest, ExportTarget
from robx.images.sources import ImageSource
from robx.linear_head import load_head
from robx.progress import Progress, silent
from robx.records import (
    Bundle,
    Precision,
    Preprocessing,
    Rung,
    Value,
    Verdict,
    load_bundle,
    load_student,
)
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
        with contextlib.closing(Judge(workshop, options.limits)) as judging:
            bundle, folder = _decide(judging, options, on_rung)
        if options.sensitivity:
            _ = workshop.layer_costs
        out = out or student_folder / f"{target.format}-{bundle.precision}"
        return ship(bundle, folder, out, layer_costs=workshop.__dict__.get("layer_costs"))


def _decide(judge: Judge, options: Options, on_rung: Callable[[Rung], None] | None) -> tuple[Bundle, Path]:
    """What ships: the bundle's record without its parity, and the folder that holds its files."""
    asked: Precision = judge.workshop.request.precision
    fp32 = Candidate(name="fp32", precision="fp32")
    if asked == "fp32":
        return _accept(judge, fp32, (), "fp32")
    rungs: list[Rung] = []
    if asked == "fp16" or options.force:
        chosen = Candidate(name="fp16", precision="fp16") if asked == "fp16" else _ladder(judge, options)[0]
        if (why := judge.unseen(chosen)) is not None:  # nobody here can judge it: it ships as what it is
            return _accept(judge, chosen, (), asked, note="" if asked == "fp16" else f"forced, and not run here: {why}")
    if asked == "int8":
        outcome = _climb(judge, options, on_rung)
        rungs += outcome.rungs
        if outcome.winner is not None:
            return _accept(judge, outcome.winner, tuple(rungs), asked, note=_how_chosen(outcome))
        if options.force and outcome.best is not None:
            return _force(judge, outcome.best, rungs, asked)
    fp16 = Candidate(name="fp16", precision="fp16")
    half = judge.judge(fp16)
    if on_rung:
        on_rung(half)
    # Asked for, fp16 is taken for its size unless it is to be faster; as a fallback it has to be no slower than fp32.
    for_size = asked == "fp16" and options.limits.min_speedup <= 1
    good = ships(half) or (for_size and half.accuracy == "PASS")
    rungs.append(dataclasses.replace(half, kept=good))
    if good:
        return _accept(judge, fp16, tuple(rungs), asked)
    if asked == "fp16" and options.force and "cosine_mean" in half.values:
        return _force(judge, fp16, rungs, asked)
    return _accept(judge, fp32, tuple(rungs), asked)


def _climb(judge: Judge, options: Options, on_rung: Callable[[Rung], None] | None) -> Outcome:
    workshop = judge.workshop
    rungs = _ladder(judge, options)

    def more(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        if options.rungs is not None or best.quantiser in ("converter", "none"):
            return []
        return sensitive_rungs(best, list(workshop.layer_costs), tried)

    margin = options.limits.max_drop
    return climb(
        rungs, judge.look, judge.hold, race=judge.race, margin=margin, more=more, on_rung=on_rung, budget=options.budget
    )


def _ladder(judge: Judge, options: Options) -> list[Candidate]:
    workshop = judge.workshop
    target = workshop.request.target
    return limit(ladder(target.format, workshop.facts, machine_of(target.device)), options.rungs)


def _how_chosen(outcome: Outcome) -> str:
    """How the winner came to be the one, for the reader who knows that the best of many flatters itself."""
    if len(outcome.rungs) == 1:
        return ""
    held = "the only one held" if outcome.held == 1 else f"number {outcome.held} held"
    return f"chosen from {len(outcome.rungs)} by speed and by other images, and {held} to the judging images"


def _force(judge: Judge, candidate: Candidate, rungs: Sequence[Rung], asked: Precision) -> tuple[Bundle, Path]:
    """A candidate that did not pass, with its figures on the judging images, marked."""
    judged = [judge.judge(candidate) if r.name == candidate.name and not r.was_judged else r for r in rungs]
    kept = tuple(dataclasses.replace(rung, kept=rung.name == candidate.name) for rung in judged)
    return _accept(judge, candidate, kept, asked, forced=True)


def _accept(
    judge: Judge,
    candidate: Candidate,
    rungs: tuple[Rung, ...],
    asked: Precision,
    *,
    forced: bool = False,
    note: str = "",
) -> tuple[Bundle, Path]:
    workshop = judge.workshop
    folder = workshop.make(candidate)
    bundle = load_bundle(folder)
    verdict, reason = _verdict(rungs, forced=forced)
    reason = "; ".join(part for part in (reason, note) if part)
    parity: dict[str, Value] = {}
    if candidate.precision != "int8":
        parity, unseen = judge.parity(candidate, judged=candidate.precision == "fp16" and bool(rungs))
        if unseen is not None:
            reason = f"{reason}; not run here: {unseen}" if reason else f"not run here: {unseen}"
        if candidate.precision == "fp32":
            verdict = "PASS" if parity and workshop.splits is not None else "NOT_JUDGED"
            reason = _fp32_reason(reason, parity, real=workshop.splits is not None)
    screening = judge.screening if rungs else None
    bundle = dataclasses.replace(
        bundle,
        requested=asked,
        verdict=verdict,
        reason="; ".join(part for part in (reason, bundle.reason) if part),
        rungs=rungs,
        parity=parity,
        calibration=workshop.splits.record(screening) if workshop.splits is not None else None,
    )
    return bundle, folder


def _verdict(rungs: tuple[Rung, ...], *, forced: bool) -> tuple[Verdict | Literal["FORCED", "NOT_JUDGED"], str]:
    """The bundle's verdict and reason from the rung that was kept."""
    kept = next((rung for rung in rungs if rung.kept), None)
    if kept is None:
        return "NOT_JUDGED", "no candidate passed: fp32 ships instead" if rungs else ""
    if forced:
        return "FORCED", f"FAILED the gate and was forced: {kept.reason}"
    # An accuracy that passed and a speed that was not measured is no whole PASS.
    return ("PASS" if "speedup_fp32" in kept.values else "INCONCLUSIVE"), kept.reason


def _fp32_reason(reason: str, parity: dict[str, Value], *, real: bool) -> str:
    if not parity:
        return reason
    images = "held-out images" if real else "drawn images (give --data to check on real ones)"
    same = f"as PyTorch within {parity['max_abs'].value:.1e} on {images}"
    return f"{reason}; {same}" if reason else same


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
