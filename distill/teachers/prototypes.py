"""Prototypes for teachers that were published without a head, fitted to their own features on the user's images.

This goes beyond the paper, whose teachers bring the prototypes that they were pretrained with: here the K centres of
a spherical k-means over the trunk's features take their place, and the MSN or SwAV objective applies as it is. Features
are centred on their mean first, for pooled activations share a large common part that would make all cosines alike.

D width of the features   K prototypes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from robx.distill.teachers.kmeans import StreamingKMeans, spherical_kmeans
from robx.errors import CorruptImage, InputError
from robx.images.reading import read_batches, reader
from robx.images.sources import ImageSource
from robx.progress import Progress
from robx.records import Preprocessing
from robx.store.files import sha256_bytes, write_bytes
from robx.store.folders import wait_for

# Beyond this many points a centre, more of them no longer move it (the rule of thumb of FAISS).
_POINTS_PER_CENTRE = 256
# Of the features that are kept; k-means holds three such tensors.
_FEATURE_BYTES = 2 * 1024**3
_BATCH = 64
_VERSION = 1

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FitSettings:
    """All that decides the fitted prototypes; two equal ones give the same file."""

    teacher: str  # SHA-256 of the teacher's weights
    data: str  # ImageSource.fingerprint
    prototypes: int  # K
    size: int  # pixels of the shorter side after the resize
    crop: int  # pixels of the square that the teacher sees
    seed: int = 0
    streaming: bool = False
    normalisation: tuple[float, ...] = ()  # mean and std of the teacher's pixels: one file may serve two names
    version: int = _VERSION

    @property
    def id(self) -> str:
        """Sixteen hex digits of the settings."""
        return sha256_bytes(json.dumps(asdict(self), sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class Prototypes:
    """What was fitted, and to how much."""

    mean: Tensor  # (D,)
    vectors: Tensor  # (K, D), unit rows
    images: int  # that were read
    skipped: int  # that could not be
    objective: float  # mean cosine between an image's centred feature and its nearest prototype; nan when streaming


def images_to_fit(images: int, *, prototypes: int, width: int) -> int:
    """How many of `images` a fit reads: all of them where no feature can be kept, else at most 256 a prototype."""
    if has_to_stream(images=images, prototypes=prototypes, width=width):
        return images
    return min(images, _POINTS_PER_CENTRE * prototypes)


def has_to_stream(*, images: int, prototypes: int, width: int) -> bool:
    """Whether the features (N, D) that a fit would keep are more than fit in memory."""
    return min(images, _POINTS_PER_CENTRE * prototypes) * width * 4 > _FEATURE_BYTES


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
    """The prototypes of `settings` from `folder`, or fitted now and kept there."""
    path = folder / f"prototypes-{settings.id}.safetensors"
    with wait_for(path):
        found = load_prototypes(path, settings)
        if found is None:
            found = fit_prototypes(embed, source, preprocessing, settings, device=device, progress=progress)
            save_prototypes(path, found, settings)
        return found


def require_images(source: ImageSource, k: int) -> None:
    """Refuse a source that has fewer images than K."""
    if len(source) < k:
        few = f"{source.name} has {len(source)}"
        raise InputError(f"{k} prototypes need at least {k} images and {few}: lower --prototypes")


def fit_prototypes(
    embed: Embed,
    source: ImageSource,
    preprocessing: Preprocessing,
    settings: FitSettings,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Prototypes:
    """Fit K prototypes to what `embed` makes of pixels (N, 3, H, W), in one pass over at most 256 K images.

    With ``settings.streaming`` no feature is kept, and every image of the source is read.

    Raises:
        InputError: fewer images than prototypes, or more than one image in a hundred that cannot be read.
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
    write_bytes(path, save(tensors, metadata=facts))  # save_file has errors of its own for a full disk


def load_prototypes(path: Path, settings: FitSettings) -> Prototypes | None:
    """What `path` holds; None when it is missing, damaged or of other settings, for it can be fitted again."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("settings") != json.dumps(asdict(settings), sort_keys=True):
                return None
            mean, vectors = file.get_tensor("mean"), file.get_tensor("vectors")
    except Exception:  # safetensors raises its own kind for a damaged file
        return None
    return Prototypes(mean, vectors, int(facts["images"]), int(facts["skipped"]), float(facts["objective"]))


class _Features:
    """Reads, preprocesses and embeds images in order, and counts what could not be read."""

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
                    f"{self.source.name}: {self.skipped} images cannot be read (the last: {error}): clean it first"
                )

        read = reader(self.source, self.preprocessing)
        for found, pixels in read_batches(order.tolist(), read, batch_size=_BATCH, on_skip=skip):
            self.read += len(found)
            with torch.inference_mode():
                yield self.embed(torch.from_numpy(pixels).to(self.device)).float().cpu().clone()
            if self.progress is not None:
                self.progress(self.read + self.skipped, len(order), "teacher features for the prototypes")


def _stream(batches: Iterator[Tensor], k: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """The mean of the warm-up and streamed centres around it: once the centres exist, the mean has to stay."""
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
