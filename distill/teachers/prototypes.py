"""Prototypes for teachers that were published without a head, fitted to their features of the user's images.

This goes beyond the paper, whose teachers have the prototypes that they were pretrained with: here the K centres of a
spherical k-means over the trunk's features replace them, and the MSN or SwAV objective applies unchanged. Features are
centred on their mean first: pooled activations share a large common component that would make all cosines alike.

Two methods. "full" keeps the features of one process in float32 and runs Lloyd's algorithm. "minibatch" is for large
sets and GPUs: every process embeds its share of the images, in bf16 where the device computes in it, keeps their
features on its device in 2 bytes per value, and all fit together on mini-batches.

N images   D width of the features   K prototypes
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from robx.distill.teachers.frozen_heads import fitted_head
from robx.distill.teachers.kmeans import spherical_kmeans
from robx.distill.teachers.minibatch_kmeans import DTYPE, minibatch_kmeans, unit_points
from robx.distill.teachers.teacher import Teacher
from robx.distill.teachers.team import Alone, Team
from robx.errors import CorruptImage, InputError
from robx.images.on_device import normalised
from robx.images.reading import decode_threads, pixel_reader, read_batches
from robx.images.sources import ImageSource
from robx.progress import Progress
from robx.records import Preprocessing
from robx.store.files import sha256_bytes, write_bytes
from robx.store.locks import wait_for

# Above this many points per centre, more points hardly move it (FAISS's rule of thumb).
_POINTS_PER_CENTRE = 256
# Limits of the full method: the features in memory, of which k-means holds three copies, and the multiplications of an
# iteration, half a minute on one CPU core.
_FULL_BYTES = 2 * 1024**3
_FULL_PRODUCTS = 2**40
# Limit of the mini-batch method on the features that a process keeps: two million images at D = 1024.
_SHARE_BYTES = 4 * 1024**3
_BATCH = 64
_VERSION = 1

Embed = Callable[[Tensor], Tensor]
# "streaming" is what older versions did beyond _FULL_BYTES; its files are still read.
Method = Literal["full", "minibatch", "streaming"]
_WORDS: dict[Method, str] = {"full": "", "minibatch": "mini-batch ", "streaming": "streaming "}


@dataclass(frozen=True)
class FitSettings:
    """Everything that determines the fitted prototypes; equal settings share one cached file."""

    teacher: str  # SHA-256 of the teacher's weights
    data: str  # ImageSource.fingerprint
    prototypes: int  # K
    size: int  # pixels of the shorter side after the resize
    crop: int  # side of the square that the teacher sees, or its height, in pixels
    seed: int = 0
    method: Method = "full"
    normalisation: tuple[float, ...] = ()  # the teacher's mean and std: one file may be loaded under two names
    images: int | None = None  # at most so many are read; None: 256 per prototype
    version: int = _VERSION
    crop_width: int | None = None  # of what the teacher sees; None: a square

    @property
    def facts(self) -> dict[str, Any]:
        """The settings as a file records them; those of the older methods as older versions wrote them."""
        values = asdict(self)
        if self.images is None:  # as before there was such a setting
            del values["images"]
        method = values.pop("method")
        values["streaming"] = method == "streaming"
        if self.crop_width is None:  # older versions had squares alone
            values.pop("crop_width")
        return values | ({"method": method} if method == "minibatch" else {})

    @property
    def id(self) -> str:
        """Sixteen hex digits of the settings."""
        return sha256_bytes(json.dumps(self.facts, sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class Prototypes:
    """Fitted prototypes, and how many images they were fitted to."""

    mean: Tensor  # (D,)
    vectors: Tensor  # (K, D), unit rows
    images: int  # read
    skipped: int  # could not be read
    objective: float  # mean cosine between an image's centred feature and its nearest prototype; nan: not known
    processes: int = 1  # that fitted them


def images_to_fit(images: int, *, prototypes: int, width: int, processes: int = 1, most: int | None = None) -> int:
    """How many of `images` a fit reads: at most `most`, 256 per prototype, and what the processes can keep."""
    enough = _POINTS_PER_CENTRE * prototypes if most is None else most
    return min(images, enough, processes * (_SHARE_BYTES // (DTYPE.itemsize * width)))


def choose_method(*, images: int, prototypes: int, width: int, device: torch.device, most: int | None = None) -> Method:
    """Full k-means on a CPU up to 2 GiB of features and 2^40 products an iteration, else mini-batches."""
    values = min(images, _POINTS_PER_CENTRE * prototypes if most is None else most) * width
    fits = values * 4 <= _FULL_BYTES and values * prototypes <= _FULL_PRODUCTS
    return "full" if fits and device.type == "cpu" else "minibatch"


def fit_teacher(
    teacher: Teacher,
    source: ImageSource,
    *,
    prototypes: int,
    seed: int,
    method: Method | None,
    folder: Path,
    images: int | None = None,
    team: Team | None = None,
    progress: Progress | None,
) -> None:
    """Give a teacher without a head prototypes fitted to `source`, or those fitted earlier and kept in `folder`.

    `images` is how many of the source's are read at most; None: 256 per prototype.
    With `method` None those fitted earlier count whichever method made them: a resumed run keeps its prototypes.
    """
    team, device = team or Alone(), teacher.scale.device
    settings = FitSettings(
        teacher=teacher.info.sha256,
        data=source.fingerprint,
        prototypes=prototypes,
        size=teacher.preprocessing.size,
        crop=teacher.preprocessing.crop,
        crop_width=teacher.preprocessing.crop_width,
        seed=seed,
        normalisation=(*teacher.mean, *teacher.std),
        images=images,
    )
    if method is None:
        best = choose_method(
            images=len(source), prototypes=prototypes, width=teacher.width, device=device, most=images
        )  # fmt: skip
        kept: Iterator[Method] = (m for m in (best, *_WORDS) if _load(folder, replace(settings, method=m)) is not None)
        method = team.gather(next(kept, best))[0]
    settings = replace(settings, method=method)
    found = fit_or_load(
        teacher.features,
        source,
        teacher.preprocessing,
        settings,
        folder=folder,
        device=device,
        team=team,
        progress=progress,
    )
    teacher.set_head(fitted_head(found.mean, found.vectors))
    many = f" on {found.processes} processes" if found.processes > 1 else ""
    how = f"{prototypes} fitted by {_WORDS[method]}spherical k-means{many} to {found.images} images of {source.name}"
    teacher.info = replace(teacher.info, prototypes=f"{how} ({source.fingerprint}), seed {seed}")


def fit_or_load(
    embed: Embed,
    source: ImageSource,
    preprocessing: Preprocessing,
    settings: FitSettings,
    *,
    folder: Path,
    device: str | torch.device = "cpu",
    team: Team | None = None,
    progress: Progress | None = None,
) -> Prototypes:
    """The prototypes of `settings`: from `folder`, or fitted now and saved there.

    What the first process of `team` finds counts for all. Otherwise all fit on mini-batches together, while the full
    method is run once in every folder that processes share.
    """
    team, path = team or Alone(), _path(folder, settings)
    with wait_for(path):  # another process may be fitting
        found = _load(folder, settings)
    if team.gather(found is not None)[0]:
        return _from_first(found, team, device)
    with wait_for(path) if team.rank == 0 or settings.method == "full" else contextlib.nullcontext():
        found = _load(folder, settings) if settings.method == "full" else None
        if found is None:
            found = fit_prototypes(embed, source, preprocessing, settings, device=device, team=team, progress=progress)
            if team.rank == 0 or settings.method == "full":
                save_prototypes(path, found, settings)
    return found


def _from_first(found: Prototypes | None, team: Team, device: str | torch.device) -> Prototypes:
    """The first process's prototypes, in all of them."""
    facts: Prototypes
    empty = torch.empty(0)
    known = None if found is None else (replace(found, mean=empty, vectors=empty), *found.vectors.shape)
    facts, k, width = team.gather(known)[0]
    both = torch.zeros(k + 1, width, device=device)  # one process adds its rows, the others zeros
    if found is not None and team.rank == 0:
        both[0], both[1:] = found.mean, found.vectors
    team.sum(both)
    return replace(facts, mean=both[0].cpu(), vectors=both[1:].cpu())


def require_images(source: ImageSource, k: int, *, most: int | None = None) -> None:
    """Refuse fewer than K images, in a source or to be read of it."""
    if most is not None and most < k:
        raise InputError(f"{k} prototypes need at least {k} images, and fit_images is {most}: give fit_images = {k}")
    if len(source) < k:
        few = f"{source.name} has {len(source)}"
        raise InputError(f"{k} prototypes need at least {k} images, and {few}: lower --prototypes")


def fit_prototypes(
    embed: Embed,
    source: ImageSource,
    preprocessing: Preprocessing,
    settings: FitSettings,
    *,
    device: str | torch.device = "cpu",
    team: Team | None = None,
    progress: Progress | None = None,
) -> Prototypes:
    """Fit K prototypes to the features (B, D) that `embed` returns for pixels (B, 3, H, W), by `settings.method`.

    Raises:
        InputError: fewer images than prototypes, or more than 1 % of the images cannot be read.
    """
    require_images(source, settings.prototypes, most=settings.images)
    images = _Features(embed, source, preprocessing, device=torch.device(device), progress=progress)
    if settings.method == "minibatch":
        return _fit_minibatch(images, settings, team or Alone(), progress=progress)
    features = torch.cat([batch.cpu() for batch in images.batches(_pick(source, settings))])
    mean = features.double().mean(dim=0).float()
    fit = spherical_kmeans((features - mean).to(device), settings.prototypes, seed=settings.seed, progress=progress)
    return Prototypes(mean, fit.centres.cpu(), images.read, images.skipped, fit.objective)


def _fit_minibatch(images: _Features, settings: FitSettings, team: Team, *, progress: Progress | None) -> Prototypes:
    """Every process embeds its share of the images and keeps their features; all fit together."""
    width = images.width()
    count = images_to_fit(
        len(images.source),
        prototypes=settings.prototypes,
        width=width,
        processes=team.world,
        most=settings.images,
    )
    mine = _pick(images.source, settings)[:count][team.rank :: team.world]
    points = torch.empty(len(mine), width, dtype=DTYPE, device=images.device)
    sums = torch.zeros(width + 2, dtype=torch.float64, device=images.device)
    shift = None
    for batch in images.batches(mine, half=True):
        if shift is None:
            shift = batch.mean(dim=0)  # 16 bits hold the distance from about the mean better than the feature itself
        points[images.read - len(batch) : images.read] = batch - shift
        sums[:width] += batch.double().sum(dim=0)
    sums[width], sums[width + 1] = images.read, images.skipped
    team.sum(sums)
    mean = (sums[:width] / sums[width]).float()
    points = points[: images.read]
    unit_points(points, mean if shift is None else mean - shift)
    fit = minibatch_kmeans(points, settings.prototypes, seed=settings.seed, team=team, progress=progress)
    read, skipped = (int(number) for number in sums[width:])
    return Prototypes(mean.cpu(), fit.centres.cpu(), read, skipped, fit.objective, processes=team.world)


def save_prototypes(path: Path, prototypes: Prototypes, settings: FitSettings) -> None:
    """Write `prototypes` with their settings, atomically, as safetensors."""
    facts = {
        "settings": json.dumps(settings.facts, sort_keys=True),
        "images": str(prototypes.images),
        "skipped": str(prototypes.skipped),
        "objective": repr(prototypes.objective),
    }
    if prototypes.processes > 1:
        facts["processes"] = str(prototypes.processes)
    tensors = {"mean": prototypes.mean.contiguous(), "vectors": prototypes.vectors.contiguous()}
    write_bytes(path, save(tensors, metadata=facts))  # save_file raises other errors on a full disk


def load_prototypes(path: Path, settings: FitSettings) -> Prototypes | None:
    """The prototypes in `path`; None if it is missing, damaged or of other settings, as they can be fitted again."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("settings") != json.dumps(settings.facts, sort_keys=True):
                return None
            mean, vectors = file.get_tensor("mean"), file.get_tensor("vectors")
    except Exception:  # safetensors raises its own type for a damaged file
        return None
    numbers = int(facts["images"]), int(facts["skipped"])
    return Prototypes(mean, vectors, *numbers, float(facts["objective"]), int(facts.get("processes", "1")))


def _path(folder: Path, settings: FitSettings) -> Path:
    return folder / f"prototypes-{settings.id}.safetensors"


def _load(folder: Path, settings: FitSettings) -> Prototypes | None:
    return load_prototypes(_path(folder, settings), settings)


class _Features:
    """Reads, preprocesses and embeds images in order, and counts those that cannot be read."""

    def __init__(
        self,
        embed: Embed,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.embed, self.source, self.preprocessing = embed, source, preprocessing
        self.device, self.progress = device, progress
        self.read = self.skipped = 0

    def width(self) -> int:
        """D."""
        with torch.inference_mode():
            return self.embed(torch.zeros(1, 3, *self.preprocessing.shape, device=self.device)).shape[1]

    def batches(self, order: np.ndarray, *, half: bool = False) -> Iterator[Tensor]:
        """Features (B, D), float32, on the device, in the order of `order`; `half` computes in bf16 where that pays."""
        budget = min(max(10, len(order) // 100), len(order) - 1)

        def skip(index: int, error: CorruptImage) -> None:
            self.skipped += 1
            if self.skipped > budget:
                raise InputError(
                    f"{self.source.name}: {self.skipped} images cannot be read (the last: {error}): remove them"
                )

        read = pixel_reader(self.source, self.preprocessing)
        threads = max(1, decode_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        for found, pixels in read_batches(order.tolist(), read, batch_size=_BATCH, threads=threads, on_skip=skip):
            self.read += len(found)
            with torch.inference_mode(), self._precision(half=half):
                images = normalised(torch.from_numpy(pixels).to(self.device), self.preprocessing)
                features = self.embed(images).float()
            yield features.clone()
            if self.progress is not None:
                self.progress(self.read + self.skipped, len(order), "teacher features for the prototypes")

    def _precision(self, *, half: bool) -> contextlib.AbstractContextManager[Any]:
        if half and self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()


def _pick(source: ImageSource, settings: FitSettings) -> np.ndarray:
    """At most 256 K of the images' indices, or as many as the settings say, in random order."""
    order = np.random.default_rng(settings.seed).permutation(len(source))
    return order[: _POINTS_PER_CENTRE * settings.prototypes if settings.images is None else settings.images]
