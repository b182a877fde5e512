"""Teachers from a full checkpoint of DINO, iBOT, MSN or SwAV: trunk, head and prototypes as they were published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

from torch import nn

from robx.distill.teachers.checkpoints import NAMES, Layout, PublishedTeacher, read_teacher
from robx.distill.teachers.download import fetch
from robx.distill.teachers.frozen_heads import PrototypeHead, dino_head, msn_head, random_head, swav_head
from robx.distill.teachers.teacher import Teacher
from robx.distill.teachers.trunk_specs import VitTrunk
from robx.distill.teachers.trunks import build_published_trunk, infer_trunk, load_trunk_state, trunk_width
from robx.distill.teachers.zoo import ZOO, ZooEntry
from robx.errors import ArtifactError
from robx.image_size import ImageSize
from robx.progress import Progress
from robx.store.files import sha256_file


def load(entry: ZooEntry, path: Path, *, image_size: ImageSize, own_normalisation: bool = False) -> Teacher:
    """The teacher in a full checkpoint of its method's layout.

    A checkpoint that a base method's run of robx wrote says how its pixels were normalised; `own_normalisation` keeps
    the entry's.

    Raises:
        InputError: the file does not exist.
        ArtifactError: damaged, of another method, or of another architecture.
    """
    in_zoo = entry.name in ZOO
    full = f"the full checkpoint, {entry.url}" if in_zoo else f"{NAMES[entry.method]}'s full checkpoint"
    found = read_teacher(path, cast(Layout, entry.method), full=full)
    spec = infer_trunk(found.trunk, arch=None if in_zoo else found.arch, where=str(path))
    if in_zoo and str(spec) != str(entry.trunk):
        raise ArtifactError(f"{path} holds {spec}, and {entry.name} is {entry.trunk}: get {full}")
    if isinstance(spec, VitTrunk) and entry.method == "msn":  # the architecture is in the shapes, this is not
        spec = dataclasses.replace(spec, position_offset=0.0)
    trunk = build_published_trunk(spec)
    load_trunk_state(trunk, found.trunk, where=str(path))
    head = _head(found, where=str(path))
    width = trunk_width(trunk)
    first = next(layer for layer in head.projection.modules() if isinstance(layer, nn.Linear))
    if first.in_features != width:
        raise ArtifactError(f"{path}: the head takes {first.in_features} numbers, the trunk has {width}: get {full}")
    if found.normalisation is not None and not own_normalisation:
        entry = dataclasses.replace(entry, mean=found.normalisation[0], std=found.normalisation[1])
    return Teacher.of(entry, trunk, head, sha256=sha256_file(path), image_size=image_size)


def build(entry: ZooEntry, *, image_size: ImageSize) -> Teacher:
    """The teacher of a zoo entry with random weights."""
    trunk = build_published_trunk(entry.trunk)
    shapes = dataclasses.asdict(entry.head) if entry.head is not None else {}
    head = random_head(trunk_width(trunk), **shapes)
    return Teacher.of(entry, trunk, head, sha256="", image_size=image_size)


def download(entry: ZooEntry, folder: Path, progress: Progress | None) -> Path:
    """The zoo entry's file, downloaded once into `folder`.

    Raises:
        InputError: no network; the message names the file to get.
    """
    hint = f"get {entry.url} elsewhere and give it with --teacher-weights FILE"
    # File names repeat on the hosts (iBOT's are all checkpoint.pth), so the teacher's own name is used.
    return fetch(entry.url, folder, name=f"{entry.name}.pth", sha256=entry.sha256, hint=hint, progress=progress)


def _head(found: PublishedTeacher, *, where: str) -> PrototypeHead:
    match found.layout:
        case "dino" | "ibot":
            return dino_head(found.head, where=where)
        case "msn" if found.prototypes is not None:
            return msn_head(found.head, found.prototypes, where=where)
        case "swav":
            return swav_head(found.head, where=where)
    raise ArtifactError(f"{where} has no head: get the full checkpoint")
