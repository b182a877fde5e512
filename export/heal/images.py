"""The images for healing: training images that neither calibrate nor screen nor judge, lightly cropped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np

from robx.errors import InputError
from robx.export.image_splits import Splits, normalise, shuffled
from robx.images.decode import resize_and_crop
from robx.images.reading import read_batches
from robx.progress import Progress, silent
from robx.records import Preprocessing
from robx.store.files import sha256_bytes

MIN_IMAGES = 32  # fewer would be memorised
MAX_IMAGES = 4000
_MAX_BYTES = 512 * 2**20
_READ_BATCH = 32


@dataclass(frozen=True)
class HealingImages:
    """Images with the margin that the deployment's centre crop removes, so that crops can move a little."""

    pixels: np.ndarray  # uint8 (N, 3, H + margin, W + margin)
    preprocessing: Preprocessing  # of the deployment
    fingerprint: str  # of all images, cropped as in deployment

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.pixels)

    def crops(self, indices: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A random crop of each image, mirrored or not, in the deployment's size: normalised float32 (n, 3, H, W)."""
        height, width = self.preprocessing.shape
        room = np.array(self.pixels.shape[2:]) - (height, width)
        corners = (random.random((len(indices), 2)) * (room + 1)).astype(int)
        mirrored = random.random(len(indices)) < 0.5
        found = np.empty((len(indices), 3, height, width), np.uint8)
        for row, (index, (top, left), mirror) in enumerate(zip(indices, corners, mirrored, strict=True)):
            crop = self.pixels[index, :, top : top + height, left : left + width]
            found[row] = crop[:, :, ::-1] if mirror else crop
        return normalise(found, self.preprocessing)


def read_healing_images(splits: Splits, preprocessing: Preprocessing, *, progress: Progress = silent) -> HealingImages:
    """Up to 4,000 training images, or 512 MB of them, without those that calibrate, screen or judge.

    Images of the bank may be among them: it trains the judge's probe on the fp32 student's features, which stay the
    same. Unreadable images are left out; `read_splits` has reported them.

    Raises:
        InputError: fewer than 32 are left.
    """
    source, wide = splits.train, _with_margin(preprocessing)
    most = min(MAX_IMAGES, _MAX_BYTES // (3 * wide.shape[0] * wide.shape[1]))
    order = shuffled(source).tolist()

    def read(index: int) -> np.ndarray:
        """The image with its margin, then as in deployment, by which it is identified: uint8 (n,)."""
        image = source.read(index)
        parts = (_array(resize_and_crop(image, each)) for each in (wide, preprocessing))
        return np.concatenate([part.reshape(-1) for part in parts])

    seen = {digest for part in (splits.calibration, splits.screening, splits.judging) for digest in part.digests}
    size, pixels, digests = 3 * wide.shape[0] * wide.shape[1], list[np.ndarray](), list[bytes]()
    batches = read_batches(order, read, batch_size=_READ_BATCH)
    with contextlib.closing(batches):
        for row in (row for _, rows in batches for row in rows):
            digest = hashlib.sha256(row[size:].tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            digests.append(digest)
            pixels.append(row[:size].reshape(3, *wide.shape))
            if len(pixels) % 50 == 0:
                progress(len(pixels), min(most, len(order)), "reading images to heal with")
            if len(pixels) == most:
                break
    if len(pixels) < MIN_IMAGES:
        raise InputError(
            f"{source.name} has {len(pixels)} training images left to heal with and at least {MIN_IMAGES} are needed: "
            "add images, or lower --calibration-images for a demonstration"
        )
    return HealingImages(np.stack(pixels), preprocessing, sha256_bytes(b"".join(digests))[:16])


def _with_margin(preprocessing: Preprocessing) -> Preprocessing:
    """The same resize, with the largest crop that every image has."""
    height, width = preprocessing.shape
    size = max(preprocessing.size, height)
    wide = size if height == width else max(width, size * width // height)
    return dataclasses.replace(preprocessing, size=size, crop=size, crop_width=None if wide == size else wide)


def _array(image: object) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
