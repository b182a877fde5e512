"""The folders of an export: its cache below the student's, and the bundle's own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from robx import __version__
from robx.errors import ArtifactError, InputError
from robx.export.formats import to_onnx
from robx.export.request import ExportRequest
from robx.records import Bundle, BundleFile, describe_file, save_bundle, to_json
from robx.store.files import sha256_bytes, write_json
from robx.store.folders import new_folder
from robx.store.onnx_safety import load_checked

CACHE = "export-cache"


def cached_onnx(student_folder: Path, model: to_onnx.ExportModel, request: ExportRequest, *, head: str | None) -> Path:
    """The float32 ONNX of a student, exported once for each of the settings that change it."""
    target = request.target
    key = [request.student.sha256, target.batch, target.opset, target.uint8_input, head, __version__]
    key += [version(name) for name in ("torch", "onnxscript", "onnx")]
    key.append(to_json(request.student.preprocessing))
    path = student_folder / CACHE / f"{sha256_bytes(repr(key).encode())[:24]}.onnx"
    if not _is_sound(path):
        to_onnx.export_onnx(model, path, student=request.student, batch=target.batch, opset=target.opset)
    return path


def _is_sound(path: Path) -> bool:
    """Whether a cached model is there and can be read: a damaged one is made again."""
    try:
        load_checked(path)
    except (ArtifactError, InputError):
        return False
    return True


def _has_bundle(folder: Path) -> bool:
    """Whether its manifest is robx's, damaged or not: others call a file of theirs manifest.json too."""
    try:
        text = (folder / "manifest.json").read_text(errors="replace")
    except OSError:
        return False
    return all(f'"{key}"' in text for key in ("format", "precision", "requested", "verdict"))


def require_bundle_place(out: Path) -> None:
    """Raise InputError where a bundle put at `out` would replace anything but a bundle."""
    if out.is_dir() and any(out.iterdir()) and not _has_bundle(out):
        raise InputError(f"{out} has files in it and is no bundle: choose another folder, for it would be replaced")
    if (out / "student.json").exists():
        raise InputError(f"{out} holds a student: choose another folder for the bundle")


def ship(bundle: Bundle, folder: Path, out: Path, *, layer_costs: Mapping[str, float] | None) -> Bundle:
    """Copy a bundle's files from `folder` to `out`, with its notes, and write the manifest last; whole or not at all.

    Raises:
        InputError: `out` holds something else than a bundle, which would be lost.
    """
    require_bundle_place(out)
    with new_folder(out) as temporary:
        for file in bundle.files:
            (temporary / file.path).parent.mkdir(parents=True, exist_ok=True)  # a Core ML package is a folder
            shutil.copyfile(folder / file.path, temporary / file.path)
        files: tuple[BundleFile, ...] = bundle.files
        if layer_costs is not None:
            write_json(temporary / "sensitivity.json", dict(layer_costs))
            files = (*files, describe_file(temporary, "sensitivity.json", "notes"))
        if bundle.labels is not None:
            write_json(temporary / "labels.json", list(bundle.labels))
            files = (*files, describe_file(temporary, "labels.json", "labels"))
        bundle = dataclasses.replace(bundle, files=files)
        save_bundle(bundle, temporary)
    return bundle
