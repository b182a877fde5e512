"""The bundle's folder: where it may be written, and writing it as a whole."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from robx.errors import ArtifactError, InputError
from robx.records import Bundle, BundleFile, describe_file, from_json, save_bundle
from robx.store.files import read_json, write_json
from robx.store.folders import new_folder


def _has_bundle(folder: Path) -> bool:
    """Whether `folder` has a manifest of robx, damaged or not; other tools write a manifest.json too."""
    try:
        text = (folder / "manifest.json").read_text(errors="replace")
    except OSError:
        return False
    return all(f'"{key}"' in text for key in ("format", "precision", "requested", "verdict"))


def require_bundle_place(out: Path) -> None:
    """Raise InputError if a bundle written to `out` would replace anything but a bundle."""
    if out.is_dir() and any(out.iterdir()) and not _has_bundle(out):
        raise InputError(f"{out} is not empty and is not a bundle: choose another folder")
    if (out / "student.json").exists():
        raise InputError(f"{out} holds a student: choose another folder for the bundle")


def _files_of(folder: Path) -> list[str]:
    """The files of the bundle in `folder`, by its manifest; none when there is no bundle."""
    try:
        bundle = from_json(Bundle, read_json(folder / "manifest.json"))
    except ArtifactError:
        return []
    return ["manifest.json", *(file.path for file in bundle.files)]


def ship(bundle: Bundle, folder: Path, out: Path, *, layer_costs: Mapping[str, float] | None) -> Bundle:
    """Copy a bundle's files from `folder` to `out` and write the manifest last; `out` is complete or unchanged.

    Raises:
        InputError: `out` is not a bundle and would be replaced.
    """
    require_bundle_place(out)
    with new_folder(out, ours=_files_of(out)) as temporary:
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
