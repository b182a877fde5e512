"""Prototypes for teachers that were published without a head, fitted to their features of the user's images.

This goes beyond the paper, whose teachers have the prototypes that they were pretrained with: here the K centres of a
spherical k-means over the trunk's features replace them, and the MSN or SwAV objective applies unchanged. Features are
centred on their mean first: pooled activations share a large common component that would make all cosines alike.

D width of the features   K prototypes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from robx.distill.teachers.frozen_heads import fitted_head
from robx.distill.teachers.kmeans import StreamingKMeans, spherical_kmeans
from robx.distill.teachers.teacher import Teacher
from robx.errors import CorruptImage, InputError
from robx.images.reading import read_batches, reader
from robx.images.sources import ImageSource
from robx.progress import Progress
from robx.records import Preprocessing
from robx.store.files import sha256_bytes, write_bytes
from robx.store.locks import wait_for

# Above this many points per centre, more points hardly move it (FAISS's rule of thumb).
_POINTS_PER_CENTRE = 256
# Limit on the features kept in memory; k-means holds three such tensors.
_FEATURE_BYTES = 2 * 1024**3
_BATCH = 64
_VERSION = 1

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FitSettings:
    """Everything that determines the fitted prototypes; equal settings share one cached file."""

    teacher: str  # SHA-256 of the teacher's weights
    data: str  # ImageSource.fingerprint
    prototypes: int  # K
    size: int  # pixels of the shorter side after the resize
    crop: int  # side of the square that the teacher sees, in pixels
    seed: int = 0
    streaming: bool = False
    normalisation: tuple[float, ...] = ()  # the teacher's mean and std: one file may be loaded under two names
    version: int = _VERSION

    @property
    def id(self) -> str:
        """Sixteen hex digits of the settings."""
        return sha256_bytes(json.dumps(asdict(self), sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class Prototypes:
    """Fitted prototypes, and how many images they were fitted to."""

    mean: Tensor  # (D,)
    vectors: Tensor  # (K, D), unit rows
    images: int  # read
    skipped: int  # could not be read
    objective: float  # mean cosine between an image's centred feature and its nearest prototype; nan when streaming


def images_to_fit(images: int, *, prototypes: int, width: int) -> int:
    """Number of `images` that a fit reads: all of them when streaming, else at most 256 per prototype."""
    if has_to_stream(images=images, prototypes=prototypes, width=width):
        return images
    return min(images, _POINTS_PER_CENTRE * prototypes)


def has_to_stream(*, images: int, prototypes: int, width: int) -> bool:
    """Whether the features (N, D) that a fit would keep exceed the memory limit."""
    return min(images, _POINTS_PER_CENTRE * prototypes) * width * 4 > _FEATURE_BYTES


def fit_teacher(
    teacher: Teacher,
    source: ImageSource,
    *,
    prototypes: int,
    seed: int,
    streaming: bool | None,
    folder: Path,
    progress: Progress | None,
) -> None:
    """Give a teacher without a head prototypes fitted to `source`, or those fitted earlier and kept in `folder`."""
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
        normalisation=(*teacher.mean, *teacher.std),
    )
    device = teacher.scale.device
    found = fit_or_load(
        teacher.features, source, teacher.preprocessing, settings, folder=folder, device=device, progress=progress
    )
    teacher.set_head(fitted_head(found.mean, found.vectors))
    way = "streaming spherical k-means" if streaming else "spherical k-means"
    how = f"{prototypes} fitted by {way} to {found.images} images of {source.name} ({source.fingerprint})"
    teacher.info = replace(teacher.info, prototypes=f"{how}, seed {seed}")


def fit_or_load(
    embed: Embed,
    source: ImageSource,
    preprocessing: Preprocessing,
    settings: FitSettings,
    *,
    folder: Path,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Prototypes:
    """The prototypes of `settings`: from `folder`, or fitted now and saved there."""
    path = folder / f"prototypes-{settings.id}.safetensors"
    with wait_for(path):
        found = load_prototypes(path, settings)
        if found is None:
            found = fit_prototypes(embed, source, preprocessing, settings, device=device, progress=progress)
            save_prototypes(path, found, settings)
        return found


def require_images(source: ImageSource, k: int) -> None:
    """Refuse a source with fewer than K images."""
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
    progress: Progress | None = None,
) -> Prototypes:
    """Fit K prototypes to the features that `embed` returns for pixels (N, 3, H, W), from at most 256 K images.

    With ``settings.streaming`` no features are kept, and every image of the source is read.

    Raises:
        InputError: fewer images than prototypes, or more than 1 % of the images cannot be read.
    """
    k = settings.prototypes
    require_images(source, k)
    order = _pick(len(source), len(source) if settings.streaming else _POINTS_PER_CENTRE * k, seed=settings.seed)
    reader = _Features(embed, source, preprocessing, device=device, progress=progress)
    if settings.streaming:
        mean, vectors = _stream(reader.batches(order), k, seed=settings.seed)
        objective = float("nan")
    else:
        features = torch.cat(list(reader.batches(order)))
        mean = features.double().mean(dim=0).float()
        found = spherical_kmeans((features - mean).to(device), k, seed=settings.seed, progress=progress)
        vectors, objective = found.centres.cpu(), found.objective
    return Prototypes(mean, vectors, reader.read, reader.skipped, objective)


def save_prototypes(path: Path, prototypes: Prototypes, settings: FitSettings) -> None:
    """Write `prototypes` with their settings, atomically, as safetensors."""
    facts = {
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "images": str(prototypes.images),
        "skipped": str(prototypes.skipped),
        "objective": repr(prototypes.objective),
    }
    tensors = {"mean": prototypes.mean.contiguous(), "vectors": prototypes.vectors.contiguous()}
    write_bytes(path, save(tensors, metadata=facts))  # save_file raises other errors on a full disk


def load_prototypes(path: Path, settings: FitSettings) -> Prototypes | None:
    """The prototypes in `path`; None if it is missing, damaged or of other settings, as they can be fitted again."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("settings") != json.dumps(asdict(settings), sort_keys=True):
                return None
            mean, vectors = file.get_tensor("mean"), file.get_tensor("vectors")
    except Exception:  # safetensors raises its own type for a damaged file
        return None
    return Prototypes(mean, vectors, int(facts["images"]), int(facts["skipped"]), float(facts["objective"]))


class _Features:
    """Reads, preprocesses and embeds images in order, and counts those that cannot be read."""

    def __init__(
        self,
        embed: Embed,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        device: str | torch.device,
        progress: Progress | None,
    ) -> None:
        self.embed, self.source, self.preprocessing = embed, source, preprocessing
        self.device, self.progress = device, progress
        self.read = self.skipped = 0

    def batches(self, order: np.ndarray) -> Iterator[Tensor]:
        """Features (B, D) on the CPU, in the order of `order`."""
        budget = min(max(10, len(order) // 100), len(order) - 1)

        def skip(index: int, error: CorruptImage) -> None:
            self.skipped += 1
            if self.skipped > budget:
                raise InputError(
                    f"{self.source.name}: {self.skipped} images cannot be read (the last: {error}): remove them"
                )

        read = reader(self.source, self.preprocessing)
        for found, pixels in read_batches(order.tolist(), read, batch_size=_BATCH, on_skip=skip):
            self.read += len(found)
            with torch.inference_mode():
                yield self.embed(torch.from_numpy(pixels).to(self.device)).float().cpu().clone()
            if self.progress is not None:
                self.progress(self.read + self.skipped, len(order), "teacher features for the prototypes")


def _stream(batches: Iterator[Tensor], k: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """The mean of the warm-up and the streamed centres around it; the mean must stay fixed once centres exist."""
    clusters, waiting, mean = StreamingKMeans(k, seed=seed), list[Tensor](), None
    for batch in batches:
        if mean is None:
            waiting.append(batch)
            if sum(map(len, waiting)) < clusters.warm_up:
                continue
            batch = torch.cat(waiting)
            mean = batch.double().mean(dim=0).float()
        clusters.update(batch - mean)
    if mean is None:  # fewer images than the warm-up
        everything = torch.cat(waiting)
        mean = everything.double().mean(dim=0).float()
        clusters.update(everything - mean)
    return mean, clusters.centres()


def _pick(images: int, limit: int, *, seed: int) -> np.ndarray:
    """At most `limit` of the places 0 .. images - 1, in random order."""
    return np.random.default_rng(seed).permutation(images)[:limit]
