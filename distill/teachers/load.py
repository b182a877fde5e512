"""Teachers by name: read whole, head and prototypes included, from what was published, or given fitted prototypes.

    name --zoo--> file --checkpoints--> tensors --> trunk + head --> Teacher (frozen_teacher.py)

Every Teacher takes ImageNet-normalised pixels and answers with scores before the temperature.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from robx.distill.students.student import refusal
from robx.distill.teachers.checkpoints import NAMES, PublishedTeacher, read_teacher
from robx.distill.teachers.download import fetch
from robx.distill.teachers.from_timm import build_timm_teacher, load_timm_teacher
from robx.distill.teachers.frozen_heads import PrototypeHead, dino_head, fitted_head, msn_head, random_head, swav_head
from robx.distill.teachers.prototypes import FitSettings, fit_or_load, has_to_stream
from robx.distill.teachers.teacher import Method, Teacher, TeacherScores
from robx.distill.teachers.trunks import (
    TimmTrunk,
    build_published_trunk,
    infer_trunk,
    load_trunk_state,
    trunk_width,
)
from robx.distill.teachers.zoo import ZOO, ZooEntry, find_teacher, with_head
from robx.errors import ArtifactError, InputError
from robx.images.sources import ImageSource
from robx.progress import Progress
from robx.records import Preprocessing, TeacherInfo
from robx.store.files import cache_folder, sha256_file

__all__ = ["ZOO", "Method", "Teacher", "TeacherScores", "build_teacher_skeleton", "load_teacher"]


def load_teacher(
    name: str,
    *,
    weights: Path | None = None,
    cache: Path | None = None,
    source: ImageSource | None = None,
    prototypes: int = 1024,
    objective: str | None = None,
    image_size: int = 224,
    seed: int = 0,
    streaming: bool | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Teacher:
    """Read, or download once and read, a teacher.

    Args:
        name: a name of the zoo; ``dino``, ``ibot``, ``msn`` or ``swav`` for any file of that layout (with `weights`);
            or ``timm:NAME`` for a trunk of timm's.
        weights: the file to read instead of downloading one.
        cache: where downloads and fitted prototypes are kept; ``$ROBX_CACHE`` or ``~/.cache/robx`` by default.
        source: the images that prototypes are fitted to, for a teacher that was published without a head.
        prototypes: K of the fitted prototypes; a published head keeps its own.
        objective: ``dino``, ``ibot``, ``msn``, ``swav`` or ``kd``; refuses a teacher that cannot serve it, and makes
            ``kd`` keep the classifier. None takes what the teacher has.
        image_size: pixels of the square that the teacher will see; prototypes are fitted at this size.
        seed: of the fitting.
        streaming: fit in one pass that keeps no feature, over all images; None: where they are too many to keep.
        device: where the fitting runs and where the teacher is left.
        progress: called with (done, total, note), for the download and the fitting.

    Raises:
        InputError: unknown name, no network, or a teacher without what `objective` needs; the message says what to do.
        ArtifactError: a file that is damaged, of another method, or of another architecture.
    """
    entry = _entry(name, weights)
    method = _method(entry, objective)
    folder = cache or cache_folder()
    if method in ("headless", "classifier"):
        if method == "headless" and source is None:
            raise InputError(f"teacher {name} has no published head: give images (--data) to fit prototypes to")
        trunk, sha256 = load_timm_teacher(
            entry, classifier=method == "classifier", weights=weights, folder=folder, progress=progress
        )
        teacher = _timm_teacher(entry, trunk, method=method, sha256=sha256, image_size=image_size)
        teacher = _sized(teacher, image_size).to(device)
        if method == "headless" and source is not None:
            _fit(teacher, entry, source, prototypes, seed=seed, streaming=streaming, folder=folder, progress=progress)
        return teacher
    path = weights if weights is not None else _download(entry, folder, progress)
    return _sized(_published(entry, path, image_size=image_size), image_size).to(device)


def build_teacher_skeleton(
    name: str,
    *,
    weights: Path | None = None,
    objective: str | None = None,
    prototypes: int = 1024,
    image_size: int = 224,
) -> Teacher:
    """The teacher's network with random weights and no network access: for ``--dry-run``; its sha256 is empty.

    A generic name (``dino`` ...) has no architecture of its own: `weights` is read for it.

    Raises:
        InputError: unknown name, or a teacher that cannot serve `objective`.
    """
    entry = _entry(name, weights)
    method = _method(entry, objective)
    if entry.name not in ZOO and method not in ("headless", "classifier") and weights is not None:
        return _sized(_published(entry, weights, image_size=image_size), image_size)
    if method in ("headless", "classifier"):
        trunk = build_timm_teacher(entry, classifier=method == "classifier")
        teacher = _timm_teacher(entry, trunk, method=method, sha256="", image_size=image_size)
        if method == "headless":
            head = fitted_head(torch.zeros(teacher.width), torch.randn(prototypes, teacher.width))
            teacher.head, teacher.num_prototypes = head, prototypes
        return _sized(teacher, image_size)
    trunk = build_published_trunk(entry.trunk)
    shapes = dataclasses.asdict(entry.head) if entry.head is not None else {}
    head = random_head(trunk_width(trunk), **shapes)
    return _sized(_assemble(entry, trunk, head, sha256="", image_size=image_size), image_size)


def _entry(name: str, weights: Path | None) -> ZooEntry:
    """The zoo's entry; ``dino``, ``ibot``, ``msn`` and ``swav`` mean any file of that layout."""
    if name not in NAMES or name == "backbone":
        return find_teacher(name)
    if weights is None:
        published = ", ".join(entry.name for entry in ZOO.values() if entry.method == name)
        raise InputError(f"--teacher {name} reads your own file: give --teacher-weights, or take {published}")
    bound = {entry.licence for entry in ZOO.values() if entry.method == name and entry.non_commercial}
    licence = f"unknown (a file of yours{''.join(f'; the published ones are {text}' for text in sorted(bound))})"
    return ZooEntry(name, cast(Any, name), TimmTrunk(""), None, 0, licence)


def _method(entry: ZooEntry, objective: str | None) -> Method:
    """What the teacher answers under `objective`."""
    known = ("dino", "ibot", "msn", "swav", "kd")
    if objective is not None and objective not in known:
        raise InputError(f"unknown objective {objective!r}: choose one of {', '.join(known)}")
    if entry.method == "headless":
        if objective in ("dino", "ibot"):
            if full := with_head(entry):
                raise InputError(
                    f"teacher {entry.name} is the backbone alone, and {NAMES[objective]}'s loss needs the head that "
                    f"it was pretrained with: take --teacher {full.name} --objective {full.method} ({full.file})"
                )
            raise InputError(
                f"teacher {entry.name} was published without a head, and {NAMES[objective]}'s loss needs the one that "
                "it was pretrained with: use --objective msn or swav, whose prototypes can be fitted"
            )
        return "classifier" if objective == "kd" else "headless"
    if objective == "kd":
        raise InputError(f"teacher {entry.name} has no classifier, which --objective kd needs: use timm:NAME")
    if objective is not None and objective != entry.method:
        raise InputError(
            f"teacher {entry.name} has the prototypes of {NAMES[entry.method]}, not of {NAMES[objective]}: "
            f"use --objective {entry.method}, or fit prototypes to a trunk of timm's (timm:NAME)"
        )
    return entry.method


def _download(entry: ZooEntry, folder: Path, progress: Progress | None) -> Path:
    hint = f"get {entry.url} elsewhere and give it with --teacher-weights FILE"
    # The host's names repeat (iBOT's are all checkpoint.pth): the teacher's own name tells them apart.
    return fetch(
        entry.url, folder / "teachers", name=f"{entry.name}.pth", sha256=entry.sha256, hint=hint, progress=progress
    )


def _published(entry: ZooEntry, path: Path, *, image_size: int) -> Teacher:
    """A teacher from a full checkpoint of its method's layout."""
    in_zoo = entry.name in ZOO
    full = f"the full checkpoint, {entry.url}" if in_zoo else f"{NAMES[entry.method]}'s full checkpoint"
    found = read_teacher(path, cast(Any, entry.method), full=full)
    spec = infer_trunk(found.trunk, arch=None if in_zoo else found.arch, where=str(path))
    if in_zoo and str(spec) != str(entry.trunk):
        raise ArtifactError(f"{path} holds {spec}, and {entry.name} is {entry.trunk}: get {full}")
    trunk = build_published_trunk(spec)
    load_trunk_state(trunk, found.trunk, where=str(path))
    head = _head(found, where=str(path))
    have = trunk_width(trunk)
    first = next(layer for layer in head.projection.modules() if isinstance(layer, nn.Linear))
    if first.in_features != have:
        raise ArtifactError(f"{path}: the head takes {first.in_features} numbers, the trunk answers {have}: get {full}")
    return _assemble(entry, trunk, head, sha256=sha256_file(path), image_size=image_size)


def _head(found: PublishedTeacher, *, where: str) -> PrototypeHead:
    match found.layout:
        case "dino" | "ibot":
            return dino_head(found.head, where=where)
        case "msn" if found.prototypes is not None:
            return msn_head(found.head, found.prototypes, where=where)
        case "swav":
            return swav_head(found.head, where=where)
    raise ArtifactError(f"{where} has no head: get the full checkpoint")


def _assemble(entry: ZooEntry, trunk: nn.Module, head: PrototypeHead, *, sha256: str, image_size: int) -> Teacher:
    return Teacher(
        trunk,
        head,
        name=entry.name,
        method=entry.method,
        info=TeacherInfo(name=entry.name, sha256=sha256, licence=entry.licence),
        preprocessing=_preprocessing(image_size),
        width=trunk_width(trunk),
        num_prototypes=len(head.prototypes),
        mean=entry.mean,
        std=entry.std,
    )


def _timm_teacher(entry: ZooEntry, trunk: nn.Module, *, method: Method, sha256: str, image_size: int) -> Teacher:
    classes = cast(int, trunk.num_classes) if method == "classifier" else 0
    how = "none: class logits" if method == "classifier" else "not fitted"
    return Teacher(
        trunk,
        None,
        name=entry.name,
        method=method,
        info=TeacherInfo(name=entry.name, sha256=sha256, licence=entry.licence, prototypes=how),
        preprocessing=_preprocessing(image_size),
        width=trunk_width(trunk),
        num_prototypes=classes,
        mean=entry.mean,
        std=entry.std,
    )


def _fit(
    teacher: Teacher,
    entry: ZooEntry,
    source: ImageSource,
    prototypes: int,
    *,
    seed: int,
    streaming: bool | None,
    folder: Path,
    progress: Progress | None,
) -> None:
    """Give a headless teacher its prototypes."""
    if streaming is None:
        streaming = has_to_stream(images=len(source), prototypes=prototypes, width=teacher.width)
    settings = FitSettings(
        teacher=teacher.info.sha256,
        data=source.fingerprint,
        prototypes=prototypes,
        size=teacher.preprocessing.size,
        crop=teacher.preprocessing.crop,
        seed=seed,
        streaming=streaming,
        normalisation=(*entry.mean, *entry.std),
    )
    found = fit_or_load(
        teacher.features,
        source,
        teacher.preprocessing,
        settings,
        folder=folder / "prototypes",
        device=teacher.scale.device,
        progress=progress,
    )
    teacher.head = fitted_head(found.mean, found.vectors).to(teacher.scale.device).eval()
    teacher.num_prototypes = prototypes
    way = "streaming spherical k-means" if streaming else "spherical k-means"
    how = f"{prototypes} fitted by {way} to {found.images} images of {source.name} ({source.fingerprint})"
    teacher.info = dataclasses.replace(teacher.info, prototypes=f"{how}, seed {seed}")


def _sized(teacher: Teacher, image_size: int) -> Teacher:
    """The teacher, once it is certain that it takes crops of this size."""
    if why := refusal(teacher.trunk, image_size):
        raise InputError(
            f"teacher {teacher.name} takes no crops of {image_size} pixels ({why}): choose another --crop-size"
        )
    return teacher


def _preprocessing(image_size: int) -> Preprocessing:
    # 256 to 224 is the protocol of all these releases; other sizes keep its ratio.
    return Preprocessing(size=round(image_size * 256 / 224), crop=image_size)
