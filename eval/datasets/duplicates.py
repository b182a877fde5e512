"""Test images that the training set contains as well: the same pixels, or nearly.

A duplicate is answered from memory and inflates every protocol. When an image is embedded it leaves a *look*: a digest
of its resized and cropped pixels, which finds exact copies under any name, and a grey 16 x 16 thumbnail. Two thumbnails
whose correlation is at least NEAR show nearly the same picture: saved again at another size or quality, recoloured, or
with a detail changed. Flipped or differently cropped copies are not found. Simple pictures (glyphs, icons) may look
alike without being copies, so the count is a warning and changes no figure.

Digests are compared for every image. Thumbnails are compared for a fixed sample of the test images where the two sets
are large, because that takes as long as a kNN search: `checked` says for how many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from robx.eval.neighbours import nearest
from robx.records import Json

NEAR = 0.995
_DIGEST = 8  # bytes
_SIDE = 16
LOOK = _DIGEST + _SIDE * _SIDE  # bytes of one look
_BLOCK = 65_536  # looks of the bank at once: 64 MB of floats
MOST_PAIRS = 4_000_000_000  # thumbnails compared: about a minute on two processors


@dataclass(frozen=True, kw_only=True)
class LookAlikes:
    """How many of `images` test images have a duplicate in the training set."""

    images: int
    identical: int  # the same pixels
    near: int  # others whose thumbnails correlate with at least NEAR
    checked: int | None = None  # test images whose thumbnails were compared; None: all

    @property
    def warning(self) -> str:
        """One line for a reader; empty if there is nothing to warn about."""
        if not self.identical + self.near:
            return ""
        least = "at least " if self.checked else ""
        return (
            f"{least}{self.identical + self.near} of {self.images} test images look like a training image "
            f"({self.identical} with the same pixels) and may be answered from memory: remove them from one of the sets"
        )


def warning_in(settings: Mapping[str, Json]) -> str:
    """The warning in a record's settings; empty if there is none."""
    found = settings.get("look_alikes")
    counts = [found.get(key) for key in ("images", "identical", "near", "checked")] if isinstance(found, dict) else []
    images, identical, near, checked = (n if isinstance(n, int) else 0 for n in counts or (0, 0, 0, 0))
    return LookAlikes(images=images, identical=identical, near=near, checked=checked or None).warning


def look(pixels: np.ndarray) -> np.ndarray:
    """The look of one image's pixels, uint8 (H, W, 3), as a model is given them: uint8 (LOOK,)."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=_DIGEST).digest()
    grey = pixels.mean(axis=2, dtype=np.float32)
    for axis in (0, 1):
        edges = np.arange(_SIDE + 1) * grey.shape[axis] // _SIDE
        grey = np.add.reduceat(grey, edges[:-1], axis=axis)
        grey /= np.maximum(1, np.diff(edges)).reshape((-1, 1) if axis == 0 else (1, -1))
    low, high = float(grey.min()), float(grey.max())
    # Correlation ignores brightness and contrast, so the thumbnail may use the full range of bytes.
    thumbnail = np.round((grey - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return np.concatenate([np.frombuffer(digest, np.uint8), thumbnail.ravel()])


def look_alikes(bank: np.ndarray, test: np.ndarray) -> LookAlikes:
    """How many of the test looks (M, LOOK) occur among the bank's (N, LOOK)."""
    same = np.isin(_digests(test), _digests(bank))
    chosen = np.arange(len(test))
    if (most := max(1, MOST_PAIRS // max(1, len(bank)))) < len(test):
        chosen = np.sort(np.random.default_rng(0).permutation(len(test))[:most])
    best = np.full(len(chosen), -1.0, np.float32)
    thumbnails = _thumbnails(test[chosen])
    for start in range(0, len(bank), _BLOCK):
        block = _thumbnails(bank[start : start + _BLOCK])
        np.maximum(best, nearest(block, thumbnails, 1)[0][:, 0], out=best)
    near = (best >= NEAR) & ~same[chosen]
    return LookAlikes(
        images=len(test),
        identical=int(same.sum()),
        near=int(near.sum()),
        checked=len(chosen) if len(chosen) < len(test) else None,
    )


def repeats(looks: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many of the images repeat the pixels of an earlier one, and how many those of an image with another label.

    Args:
        looks: their looks, (N, LOOK).
        labels: their labels, (N,), -1 for none.
    """
    _, place, counts = np.unique(_digests(looks), return_inverse=True, return_counts=True)
    known = labels >= 0
    pairs = np.unique(np.stack([place[known], labels[known]]), axis=1)
    ambiguous = np.bincount(pairs[0], minlength=len(counts)) > 1
    return int((counts - 1).sum()), int(ambiguous[place[known]].sum())


def _digests(looks: np.ndarray) -> np.ndarray:
    digests: np.ndarray = np.ascontiguousarray(looks[:, :_DIGEST]).view(np.uint64)[:, 0]
    return digests


def _thumbnails(looks: np.ndarray) -> np.ndarray:
    """float32 (N, side^2), each minus its own mean; a uniform one is 0 and correlates with nothing."""
    rows: np.ndarray = looks[:, _DIGEST:].astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows
