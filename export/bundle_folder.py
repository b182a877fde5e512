"""The bundle's folder: where it may be written, and writing it as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from robx.errors import ArtifactError, InputError, RobxError
from robx.export.readme.write_readme import readme
from robx.formats import MANIFEST_START
from robx.golden.sample import GoldenSample, write_sample
from robx.records import SUPERSEDED, Bundle, BundleFile, describe_file, from_json, save_bundle
from robx.store.files import read_bytes, read_json, sha256_file, write_json, write_text
from robx.store.folders import new_folder

README = "README.md"


def require_bundle_place(out: Path) -> None:
    """Raise InputError unless `out` is empty, does not exist, or holds a bundle, which would be replaced."""
    if (out / "student.json").exists():
        raise InputError(f"{out} holds a student: choose another folder for the bundle")
    ours = _files_of(out)
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise InputError(f"{out} is not empty and is not a bundle: choose another folder")
    if (out / README).exists() and README not in ours:
        raise InputError(f"{out / README} was not written by robx and would be replaced: move it away")


def describe_existing(out: Path) -> str:
    """The bundle that exporting to `out` replaces, in words; "" where there is none."""
    path = out / "manifest.json"
    try:
        old = from_json(Bundle, read_json(path), where=str(path))
    except ArtifactError:
        return "a damaged bundle" if _files_of(out) else ""
    return f"{old.format} {old.precision} {old.id} (verdict before: {old.verdict})"


def supersede(folder: Path, *, by: Path) -> str:
    """Mark the bundle that an earlier export left in a folder, after one in its place was refused and written to `by`.

    Returns:
        A warning about it; "" where there is no such bundle.
    """
    if folder.resolve() == by.resolve() or not (earlier := describe_existing(folder)):
        return ""
    with contextlib.suppress(RobxError):  # in a folder that cannot be written to the warning has to do
        write_text(folder / SUPERSEDED, f"A later export in place of this bundle was refused; {by.name} was written.\n")
    return (
        f"warning: {folder} still has {earlier} of an earlier export, which this one does not confirm: robx report "
        "leaves it out; remove it, or export again with settings that pass"
    )


def ship(
    bundle: Bundle, folder: Path, out: Path, *, sample: GoldenSample, layer_costs: Mapping[str, float] | None
) -> Bundle:
    """Copy a bundle's files from `folder` to `out` and add what documents it; the manifest is written last.

    `out` is complete or unchanged. The files of an older bundle in it are replaced; measurements and other files stay.

    Raises:
        InputError: `out` is not a bundle, or a file of it that robx did not write would be replaced.
    """
    require_bundle_place(out)
    with new_folder(out, ours=[*_files_of(out), SUPERSEDED]) as temporary:
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
        bundle = dataclasses.replace(bundle, files=(*files, *write_sample(sample, temporary)))
        write_text(temporary / README, readme(bundle, sample))
        bundle = dataclasses.replace(bundle, files=(*bundle.files, describe_file(temporary, README, "readme")))
        save_bundle(bundle, temporary)
    return bundle


def _files_of(folder: Path) -> list[str]:
    """The files that robx wrote of the bundle in `folder`, the manifest included; none when there is no bundle.

    Of a bundle whose manifest is damaged, which exporting again repairs, those are the files whose hash it still has.
    """
    path = folder / "manifest.json"
    try:
        bundle = from_json(Bundle, read_json(path), where=str(path))
        return ["manifest.json", *(file.path for file in bundle.files)]
    except ArtifactError:
        pass
    try:
        text = read_bytes(path).decode(errors="replace")
    except ArtifactError:
        return []
    if MANIFEST_START.match(text) is None:
        return []
    hashes = set(re.findall(r'"sha256": "([0-9a-f]{64})"', text))
    files = (item for item in folder.rglob("*") if item.is_file() and not item.is_symlink())
    return ["manifest.json", *(str(item.relative_to(folder)) for item in files if sha256_file(item) in hashes)]
