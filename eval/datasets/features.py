"""Embeddings of a source's images by any Session, cached on disk.

Images are decoded by a few threads while the model runs, and several models can share one decoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from robx.errors import CorruptImage, DeviceError, InputError, RobxError, UnreadableImage
from robx.eval.datasets.duplicates import LOOK, look
from robx.eval.ranks import Ranks
from robx.images.decode import crop_pixels, normalise_pixels
from robx.images.reading import decode_threads, read_batches
from robx.images.sources import ImageSource, labels_of
from robx.progress import Progress
from robx.records import Bundle, Preprocessing, Student, to_json
from robx.runtime.session import Session, run_within
from robx.store.files import sha256_bytes, write_atomically

BATCH = 64
# A set with a larger share of unreadable images is damaged, or not the intended one.
MOST_SKIPPED = 0.1
_ALWAYS_ALLOWED = 10
# Increased when decoding, preprocessing or the stored arrays change, which invalidates older caches.
_CACHE_FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Features:
    """One model's embeddings of one source's readable images."""

    features: np.ndarray  # float32 (N, D)
    labels: np.ndarray  # int64 (N,), -1 if unlabelled
    indices: np.ndarray  # int64 (N,), positions in the source
    skipped: int  # images that could not be read
    looks: np.ndarray = field(default_factory=lambda: np.zeros((0, LOOK), np.uint8))  # (N, LOOK), see duplicates.py


def model_id(record: Bundle | Student) -> str:
    """Bundle.id, or the first 16 hex digits of the SHA-256 of the student's weights."""
    return record.id if isinstance(record, Bundle) else record.sha256[:16]


def model_name(record: Bundle | Student) -> str:
    """A readable name: the student's, with the bundle's runtime and precision."""
    if isinstance(record, Bundle):
        return f"{record.student.timm_name} {record.runtime} {record.precision}"
    return f"{record.timm_name} torch fp32"


def extract(
    session: Session,
    source: ImageSource,
    preprocessing: Preprocessing | None = None,
    *,
    batch_size: int = BATCH,
    cache: Path | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Features:
    """Embed every readable image of `source`, in order; see `extract_each`."""
    return extract_each(
        [session], source, preprocessing, batch_size=batch_size, cache=cache, ranks=ranks, progress=progress
    )[0]


def extract_each(
    sessions: Sequence[Session],
    source: ImageSource,
    preprocessing: Preprocessing | None = None,
    *,
    batch_size: int = BATCH,
    cache: Path | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> list[Features]:
    """Embed `source` with several models that share `preprocessing`, decoding each image once.

    Args:
        sessions: the models; those whose features are cached are not run.
        source: the images; unreadable ones are skipped and counted.
        preprocessing: None is the first model's own.
        batch_size: images per run; a few batches are in memory at once.
        cache: the folder of cached features; None neither reads nor writes any.
        ranks: the processes that share the work; None is this one alone.
        progress: called with (images done, images, note).

    Raises:
        InputError: no image can be read, or more than ten and more than 10 % of them cannot.
        DeviceError: a model's output is not (N, D).
    """
    preprocessing = preprocessing or sessions[0].bundle.preprocessing
    ranks = ranks or Ranks()
    # Once, and by the process that reads the cache: a stamp asks for thousands of files.
    images = [source.fingerprint, source.stamp, len(source)] if cache and ranks.first else []
    files = [_cache_file(cache, session, images, preprocessing) for session in sessions]
    found = [_shared(_load(file) if ranks.first else None, ranks) for file in files]
    todo = [i for i, have in enumerate(found) if have is None]
    if todo:
        share = _embed_share(
            [sessions[i] for i in todo], source, preprocessing, batch_size=batch_size, ranks=ranks, progress=progress
        )
        fresh, whole = _joined(share, source, ranks)
        for i, features in zip(todo, fresh, strict=True):
            found[i] = features
            if (file := files[i]) is not None and whole and ranks.first:  # a read error may be temporary
                _save(file, features)
    return [features for features in found if features is not None]


def _shared(loaded: Features | None, ranks: Ranks) -> Features | None:
    """What the first process loaded, on every process."""
    arrays = {
        name: ranks.gather(None if loaded is None else getattr(loaded, name))
        for name in ("features", "labels", "indices", "looks")
    }
    skipped = ranks.gather(None if loaded is None else np.array([loaded.skipped]))
    if skipped is None:
        return None
    return Features(**{name: array for name, array in arrays.items() if array is not None}, skipped=int(skipped[0]))


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one process embedded of a source."""

    indices: np.ndarray  # int64 (n,), positions in the source, of the images that could be read
    looks: np.ndarray  # uint8 (n, LOOK)
    answers: list[np.ndarray | None]  # of each model, float32 (n, D); None where n is 0
    whole: bool  # whether every file could be read from disk


def _embed_share(
    sessions: Sequence[Session],
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    ranks: Ranks,
    progress: Progress | None,
) -> _Share:
    """Embed this process's share of the images with every model."""
    whole = True
    looks = np.zeros((len(source), LOOK), np.uint8)

    # Sent as bytes and normalised on the device if every model does that.
    raw = all(_takes_pixels(session, preprocessing) for session in sessions)

    def read(index: int) -> np.ndarray:
        pixels = crop_pixels(source.read(index), preprocessing)
        looks[index] = look(pixels)  # each thread writes its own rows
        return pixels if raw else normalise_pixels(pixels, preprocessing)

    def skip(index: int, error: CorruptImage) -> None:
        nonlocal whole
        whole = whole and not isinstance(error, UnreadableImage)

    kept: list[int] = []
    answers: list[list[np.ndarray]] = [[] for _ in sessions]
    for numbers, pixels in read_batches(
        ranks.share(len(source)), read, batch_size=batch_size, threads=decode_workers(ranks), on_skip=skip
    ):
        for session, answer in zip(sessions, answers, strict=True):
            answer.append(_embed(session, pixels))
        kept += numbers
        if progress:
            progress(kept[-1] + 1, len(source), f"embedding {source.name}")
    return _Share(
        indices=np.array(kept, dtype=np.int64),
        looks=looks[kept],
        answers=[np.concatenate(answer) if answer else None for answer in answers],
        whole=whole,
    )


def _joined(share: _Share, source: ImageSource, ranks: Ranks) -> tuple[list[Features], bool]:
    """The features of all processes in the source's order, and whether every file could be read from disk.

    Raises:
        InputError: too few of the images could be read.
    """
    indices = ranks.gather(share.indices if len(share.indices) else None)
    if indices is None:
        raise InputError(f"none of the {len(source)} images of {source.name} can be read: give other data")
    order = np.argsort(indices)
    indices = indices[order]
    skipped = len(source) - len(indices)
    if skipped > max(_ALWAYS_ALLOWED, MOST_SKIPPED * len(source)):
        raise InputError(
            f"{skipped} of the {len(source)} images of {source.name} cannot be read: repair or remove them first"
        )
    labels, looks = labels_of(source)[indices], ranks.all_rows(share.looks)[order]
    whole = bool(ranks.all_rows(np.array([share.whole])).all())
    rows = [ranks.gather(answer) for answer in share.answers]
    found = [
        Features(features=gathered[order], labels=labels, indices=indices, skipped=skipped, looks=looks)
        for gathered in rows
        if gathered is not None
    ]
    return found, whole


def _takes_pixels(session: Session, preprocessing: Preprocessing) -> bool:
    """Whether the session takes uint8 pixels and normalises them as `preprocessing` does."""
    own = session.bundle.preprocessing
    same = (own.mean, own.std) == (preprocessing.mean, preprocessing.std)
    return same and bool(getattr(session, "takes_pixels", False))


def decode_workers(ranks: Ranks) -> int:
    """The processors of this process: those that it may use, shared with its siblings on the machine."""
    return max(1, decode_threads() // ranks.local)


def _embed(session: Session, pixels: np.ndarray) -> np.ndarray:
    """The embeddings of one batch, float32 (N, D)."""
    # A bundle may come from others, and its graph may hold a loop without end; a student is timm's network.
    answer = run_within(session, pixels) if isinstance(session.bundle, Bundle) else session.run(pixels)
    features = np.asarray(answer, dtype=np.float32)
    if features.ndim != 2 or len(features) != len(pixels):
        raise DeviceError(
            f"{model_name(session.bundle)} returned {features.shape} for {len(pixels)} images, expected one embedding "
            "per image: export it again"
        )
    return features


def _cache_file(cache: Path | None, session: Session, images: list[Any], pre: Preprocessing) -> Path | None:
    """The file, named after everything the features depend on: weights, engine, CPU, images, preprocessing, decoder."""
    if cache is None:
        return None
    facts = session.facts()
    engine = {name: str(facts.get(name)) for name in ("engine", "version", "provider", "precision_hint", "output")}
    made_by = [_CACHE_FORMAT, PIL.__version__, platform.machine()]
    key = [model_id(session.bundle), engine, images, to_json(pre), made_by]
    return cache / f"{sha256_bytes(json.dumps(key, sort_keys=True).encode())[:32]}.npz"


def _load(file: Path | None) -> Features | None:
    """The cached features, or None when there are none or the file is damaged; they are then extracted again."""
    if file is None or not file.is_file():
        return None
    try:
        with file.open("rb") as data, np.load(data, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("features", "labels", "indices", "looks")}
            skipped = int(stored["skipped"])
    except Exception:  # zipfile raises many types on a truncated file
        return None
    return Features(**arrays, skipped=skipped)


def _save(file: Path, features: Features) -> None:
    def write(temporary: Path) -> None:
        out: BinaryIO
        with temporary.open("wb") as out:
            np.savez(out, **dataclasses.asdict(features))

    with contextlib.suppress(RobxError):  # without a cache the next run is slower, nothing else
        write_atomically(file, write)
