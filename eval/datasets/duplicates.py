"""Test images that the training images hold as well: the same pixels, or nearly.

An image that stands on both sides is answered from memory, and flatters every protocol. Each image leaves a *look* when
it is embedded: a digest of the pixels that the model saw, which finds exact copies under any name, and a grey 16 x 16
thumbnail. Two thumbnails whose correlation is at least NEAR are nearly the same picture: stored again at another
size or quality, recoloured, or changed in a detail. A flipped or differently cropped copy is not found. Simple pictures
(glyphs, plain icons) may look alike and be others: the count is a warning, and changes no figure.
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


@dataclass(frozen=True, kw_only=True)
class LookAlikes:
    """How many of `images` test images have a double among the training images."""

    images: int
    identical: int  # the same pixels
    near: int  # others whose thumbnails correlate by NEAR or more

    @property
    def warning(self) -> str:
        """One line for a reader; empty where there is nothing to warn of."""
        if not self.identical + self.near:
            return ""
        return (
            f"{self.identical + self.near} of {self.images} test images look like a training image "
            f"({self.identical} with the same pixels) and may be answered from memory: take them out of one side"
        )


def warning_in(settings: Mapping[str, Json]) -> str:
    """The warning that a record's settings hold; empty where they hold none."""
    found = settings.get("look_alikes")
    counts = [found.get(key) for key in ("images", "identical", "near")] if isinstance(found, dict) else []
    images, identical, near = (n if isinstance(n, int) else 0 for n in counts or (0, 0, 0))
    return LookAlikes(images=images, identical=identical, near=near).warning


def look(pixels: np.ndarray) -> np.ndarray:
    """The look of one preprocessed image (3, H, W): uint8 (LOOK,)."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=_DIGEST).digest()
    grey = pixels.mean(axis=0)
    for axis in (0, 1):
        edges = np.arange(_SIDE + 1) * grey.shape[axis] // _SIDE
        grey = np.add.reduceat(grey, edges[:-1], axis=axis)
        grey /= np.maximum(1, np.diff(edges)).reshape((-1, 1) if axis == 0 else (1, -1))
    low, high = float(grey.min()), float(grey.max())
    # A correlation ignores brightness and contrast, so the bytes may be stretched to their full range.
    thumbnail = np.round((grey - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return np.concatenate([np.frombuffer(digest, np.uint8), thumbnail.ravel()])


def look_alikes(bank: np.ndarray, test: np.ndarray) -> LookAlikes:
    """Which of the test's looks (M, LOOK) the bank's (N, LOOK) repeat."""
    same = np.isin(_digests(test), _digests(bank))
    best = np.full(len(test), -1.0, np.float32)
    thumbnails = _thumbnails(test)
    for start in range(0, len(bank), _BLOCK):
        block = _thumbnails(bank[start : start + _BLOCK])
        np.maximum(best, nearest(block, thumbnails, 1)[0][:, 0], out=best)
    near = (best >= NEAR) & ~same
    return LookAlikes(images=len(test), identical=int(same.sum()), near=int(near.sum()))


def _digests(looks: np.ndarray) -> np.ndarray:
    digests: np.ndarray = np.ascontiguousarray(looks[:, :_DIGEST]).view(np.uint64)[:, 0]
    return digests


def _thumbnails(looks: np.ndarray) -> np.ndarray:
    """float32 (N, side^2), each minus its own mean; a flat one is 0 and correlates with none."""
    rows: np.ndarray = looks[:, _DIGEST:].astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows
