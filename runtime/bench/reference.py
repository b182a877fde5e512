"""Verify a bundle's outputs against a reference: the latency of a wrong result is not a measurement."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robx.embeddings import centred_cosine, is_constant
from robx.errors import RobxError
from robx.images.decode import renormalise
from robx.records import Bundle, Preprocessing, Value, load_bundle, load_student
from robx.runtime.session import SessionSettings, open_session, run_within

# Minimum mean cosine to the fp32 outputs. robx eval judges int8; below this it is not the same model at all.
_FLOOR = {"fp32": 0.999, "fp16": 0.99, "int8": 0.5}
_SELF_FLOOR = 0.99  # the same bundle on another machine
_GATE_SLACK = 0.2  # how far below the export gate's cosine, on other images, a bundle may be


@dataclass(frozen=True)
class Reference:
    """Expected outputs and their origin."""

    outputs: np.ndarray  # float32 (N, D)
    name: str  # "the fp32 student in torch", ...
    is_bundle_itself: bool


def find_reference(folder: Path, bundle: Bundle, images: np.ndarray, cache: dict[Path, np.ndarray]) -> Reference | None:
    """Outputs of the fp32 student in torch, if both are available; else of its fp32 bundle; else of this bundle itself.

    None if none of the three can run on this machine. `cache` keeps the outputs for `images` by folder, for bundles of
    the same student.
    """
    run = folder.resolve().parent
    candidates: list[tuple[Path, str]] = []
    if _is_student_of(run, bundle) and all(_importable(name) for name in ("torch", "timm")):
        candidates.append((run, "the fp32 student in torch"))
    if bundle.precision != "fp32":
        siblings = [manifest.parent for manifest in sorted(run.glob("*-fp32/manifest.json"))]
        candidates += [(s, f"the fp32 bundle {s.name}") for s in siblings if _is_sibling(s, bundle)]
    candidates.append((folder, "the same bundle in a session of its own"))
    for candidate, name in candidates:
        outputs = cache.get(candidate)
        if outputs is None:
            outputs = _answers(candidate, images, bundle)
        if outputs is not None:
            cache[candidate] = outputs
            return Reference(outputs, name, candidate == folder)
    return None


def check_outputs(
    outputs: np.ndarray, seen: np.ndarray, reference: Reference | None, bundle: Bundle
) -> tuple[dict[str, Value], list[str]]:
    """Centred cosines of the timed outputs (N, D) to the reference, and reasons to reject them.

    `seen` (N,) marks the images that the timed run reached.
    """
    answers = outputs[seen]
    if not len(answers) or not np.isfinite(answers).all():
        return {}, ["output_mismatch: the outputs contain NaN or infinity, or there are none"]
    # If all images are the same one, equal outputs are right.
    differ = reference is None or not is_constant(reference.outputs[seen])
    if differ and is_constant(answers):
        return {}, ["output_mismatch: the output is the same for every image"]
    if reference is None:
        return {}, ["no_reference: neither the student nor the bundle runs on this machine"]
    expected = reference.outputs[seen]
    if expected.shape != answers.shape:
        return {}, [f"output_mismatch: the outputs have shape {answers.shape[1:]}, expected {expected.shape[1:]}"]
    cosines = centred_cosine(expected, answers)
    mean = float(cosines.mean())
    values = {
        "output_cosine": Value(value=mean, n=len(cosines)),
        "output_cosine_min": Value(value=float(cosines.min()), n=len(cosines)),
    }
    floor = _SELF_FLOOR if reference.is_bundle_itself else _floor(bundle)
    if mean >= floor:
        return values, []
    return values, [f"output_mismatch: mean cosine to {reference.name} is {mean:.3f}, expected at least {floor:.3f}"]


def _floor(bundle: Bundle) -> float:
    kept = [rung.values["cosine_mean"].value for rung in bundle.rungs if rung.kept and "cosine_mean" in rung.values]
    return max([_FLOOR[bundle.precision], *(value - _GATE_SLACK for value in kept)])


def _answers(folder: Path, images: np.ndarray, bundle: Bundle) -> np.ndarray | None:
    """Outputs of the model in `folder` for `images`, normalised for `bundle`; None if it does not run here."""
    try:
        with open_session(folder, SessionSettings(threads=os.cpu_count() or 1)) as session:
            wanted = renormalise(images, bundle.preprocessing, session.bundle.preprocessing)
            if bundle.in_model is not None and bundle.in_model.resize and session.bundle != bundle:
                wanted = _centres(wanted, session.bundle.preprocessing)  # as the bundle crops them itself
            return np.concatenate([run_within(session, wanted[i : i + 8]) for i in range(0, len(wanted), 8)])
    except RobxError:
        return None


def _centres(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The centres of images (N, 3, H, W), in the shape that `preprocessing` makes."""
    height, width = preprocessing.shape
    top, left = (round((have - want) / 2) for have, want in zip(images.shape[2:], (height, width), strict=True))
    return np.ascontiguousarray(images[:, :, top : top + height, left : left + width])


def _is_student_of(run: Path, bundle: Bundle) -> bool:
    try:
        return (run / "student.json").is_file() and load_student(run).sha256 == bundle.student.sha256
    except RobxError:
        return False


def _is_sibling(folder: Path, bundle: Bundle) -> bool:
    try:
        other = load_bundle(folder)
    except RobxError:
        return False
    return (
        other.preprocessing.same_pixels(bundle.preprocessing)
        and other.precision == "fp32"
        and other.student.sha256 == bundle.student.sha256
    )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was put into sys.modules manually has no spec
        return sys.modules.get(name) is not None
