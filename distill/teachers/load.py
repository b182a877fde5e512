"""A teacher by name: chosen, built from a published checkpoint or from timm, and given prototypes if it has none.

name --choose.py--> entry --from_checkpoint.py | from_timm.py--> Teacher (teacher.py) --prototypes.py--> its head
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from robx.distill.teachers import from_checkpoint, from_timm
from robx.distill.teachers.checkpoints import Channels
from robx.distill.teachers.choose import choose_teacher, licence
from robx.distill.teachers.frozen_heads import fitted_head
from robx.distill.teachers.prototypes import Method, fit_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.teachers.team import Team
from robx.distill.teachers.zoo import ZOO
from robx.errors import InputError
from robx.image_size import ImageSize, height_and_width, plain_size
from robx.images.sources import ImageSource
from robx.progress import Progress
from robx.store.files import cache_folder
from robx.trunk import nearest_sizes, size_error


def load_teacher(
    name: str,
    *,
    weights: Path | None = None,
    cache: Path | None = None,
    source: ImageSource | None = None,
    prototypes: int | None = 1024,
    fit_images: int | None = None,
    objective: str | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    image_size: ImageSize = 224,
    seed: int = 0,
    method: Method | None = None,
    team: Team | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Teacher:
    """Load a teacher, downloading it if it is not cached.

    Args:
        name: a name of the zoo; ``dino``, ``ibot``, ``msn`` or ``swav`` for any file of that layout (with `weights`);
            or ``timm:NAME`` for any model of timm.
        weights: a file to read instead of downloading one.
        cache: folder for downloads and fitted prototypes; default ``$ROBX_CACHE`` or ``~/.cache/robx``.
        source: images to fit prototypes to, for a teacher that was published without a head.
        prototypes: number of fitted prototypes, None for none, without images; a published head keeps its own.
        fit_images: how many images they are fitted to at most; None: 256 per prototype.
        objective: ``dino``, ``ibot``, ``msn``, ``swav`` or ``kd``; a teacher that does not fit it is refused. ``kd``
            keeps the classifier. None: the method that the teacher was pretrained with.
        mean: of the pixels (0 to 1) that the teacher was trained with; None: the published one.
        std: likewise.
        image_size: of the crops, the side or (height, width) in pixels; prototypes are fitted at this size.
        seed: random seed of the fit.
        method: of the fit, "full" or "minibatch"; None: the one that fits the set and the device, or was used before.
        team: the processes that share the fit; all of them have to call this. None: this one alone.
        device: where the fit runs and where the teacher is left.
        progress: called with (done, total, note) during the download and the fit.

    Raises:
        InputError: unknown name, no network, or a teacher without what `objective` needs; the message says what to do.
        ArtifactError: a file that is damaged, of another method, or of another architecture.
    """
    entry = choose_teacher(name, weights=weights, objective=objective, mean=mean, std=std)
    folder = cache or cache_folder()
    if entry.method == "headless" and prototypes is not None and source is None:
        raise InputError(f"teacher {name} was published without a head: give images (--data) to fit prototypes to")
    if entry.method in ("headless", "classifier"):
        teacher = from_timm.load(entry, weights=weights, folder=folder, image_size=image_size, progress=progress)
    else:
        path = weights or from_checkpoint.download(entry, folder / "teachers", progress)
        own = mean is not None or std is not None
        teacher = from_checkpoint.load(entry, path, image_size=image_size, own_normalisation=own)
    text = licence(entry, weights=weights, sha256=teacher.info.sha256)
    teacher.info = dataclasses.replace(teacher.info, licence=text)
    _require_size(teacher, image_size)
    teacher.to(device)
    if entry.method == "headless" and source is not None and prototypes is not None:
        fit_teacher(
            teacher,
            source,
            prototypes=prototypes,
            seed=seed,
            method=method,
            folder=folder / "prototypes",
            images=fit_images,
            team=team,
            progress=progress,
        )
    return teacher


def build_teacher_skeleton(
    name: str,
    *,
    weights: Path | None = None,
    objective: str | None = None,
    prototypes: int | None = 1024,
    mean: Channels | None = None,
    std: Channels | None = None,
    image_size: ImageSize = 224,
) -> Teacher:
    """The teacher's network with random weights, without network access, for ``--dry-run``; its sha256 is empty.

    A layout name (``dino`` ...) has no architecture of its own, so `weights` is read for it; a classifier's
    `weights` are read for the number of classes.

    Raises:
        InputError: unknown name, or a teacher that does not fit `objective`.
    """
    entry = choose_teacher(name, weights=weights, objective=objective, mean=mean, std=std)
    if entry.method in ("headless", "classifier"):
        teacher = from_timm.build(entry, weights=weights, image_size=image_size)
    elif entry.name not in ZOO and weights is not None:
        teacher = from_checkpoint.load(entry, weights, image_size=image_size)
    else:
        teacher = from_checkpoint.build(entry, image_size=image_size)
    if entry.method == "headless" and prototypes is not None:
        teacher.set_head(fitted_head(torch.zeros(teacher.width), torch.randn(prototypes, teacher.width)))
    _require_size(teacher, image_size)
    return teacher


def _require_size(teacher: Teacher, image_size: ImageSize) -> None:
    """Refuse a crop size that the teacher's trunk cannot process."""
    if why := size_error(teacher.trunk, image_size):
        sizes = nearest_sizes(image_size, lambda shape: not size_error(teacher.trunk, shape))
        shown, nearest = plain_size(height_and_width(image_size)), " and ".join(map(str, sizes))
        raise InputError(
            f"teacher {teacher.name} cannot process crops of {shown} pixels ({why}): choose another --crop-size or "
            "teacher_size" + (f" (nearest: {nearest})" if sizes else "")
        )
