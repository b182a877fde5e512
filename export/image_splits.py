"""The calibration images and the judging images of an export: real, deterministic, fingerprinted, disjoint.

Calibration, bank and screening images come from the training data, the judging images from its test split or, without
one, from the rest of the same data. All pass through the student's preprocessing. Images with equal pixels count as
one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import CorruptImage, InputError, NoSplit
from robx.images.decode import resize_and_crop
from robx.images.labels import labels_file, unmatched_note
from robx.images.reading import read_batches
from robx.images.sources import ImageSource, open_part, open_source
from robx.progress import Progress, silent
from robx.records import Calibration, Preprocessing
from robx.store.files import sha256_bytes

MIN_IMAGES = 300  # with fewer, the extremes of the activations are left to chance
JUDGING_IMAGES = 3000  # enough to prove a drop below one point where about 5 % of the predictions change
SCREENING_IMAGES = 400  # at most, and at most a third of the training images besides the calibration images
MIN_JUDGING = 16  # for any comparison; the gate needs more to reach a verdict
_SEED = 20260
_READ_BATCH = 32


@dataclass(frozen=True)
class Images:
    """Images after resize and crop, before normalisation, which takes a quarter of the memory of floats."""

    pixels: np.ndarray  # uint8 (N, 3, H, W)
    labels: np.ndarray  # int64 (N,), -1 where there is none
    digests: tuple[bytes, ...]  # of each image's pixels
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.pixels)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any image or their order."""
        return sha256_bytes(b"".join(self.digests))[:16]

    def part(self, places: np.ndarray) -> Images:
        """Those at `places`, int (n,)."""
        digests = tuple(self.digests[place] for place in places)
        return Images(self.pixels[places], self.labels[places], digests, self.classes)

    def normalised(self, preprocessing: Preprocessing, rows: slice | None = None) -> np.ndarray:
        """float32 (n, 3, H, W), exactly as ``robx.images.decode.preprocess`` gives them."""
        return normalise(self.pixels if rows is None else self.pixels[rows], preprocessing)

    def batches(self, preprocessing: Preprocessing, size: int) -> Iterator[np.ndarray]:
        """Normalised pieces of at most `size` images, in order."""
        for start in range(0, len(self), size):
            yield self.normalised(preprocessing, slice(start, start + size))


@dataclass(frozen=True)
class Splits:
    """The images of one export: to fit, to choose and to judge with; no image serves two of these."""

    calibration: Images
    bank: Images  # includes the calibration images, first
    screening: Images  # to choose the candidate that is judged; may be few or none
    judging: Images
    source: str  # fingerprint of `train`
    train: ImageSource  # that all but `judging` were drawn from

    def record(self, screening: Images | None = None) -> Calibration:
        """The record for the manifest; `screening` are the images that a candidate was chosen with, if any was."""
        return Calibration(
            images=len(self.calibration),
            fingerprint=self.calibration.fingerprint,
            judged_images=len(self.judging),
            judged_fingerprint=self.judging.fingerprint,
            source=self.source,
            screened_images=len(screening) if screening is not None else 0,
            screened_fingerprint=screening.fingerprint if screening is not None else "",
        )


def normalise(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 pixels (n, 3, H, W) normalised as in `preprocessing`, float32."""
    mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(1, 3, 1, 1)
    std = np.asarray(preprocessing.std, dtype=np.float32).reshape(1, 3, 1, 1)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def whole_batches(images: np.ndarray, batch: int) -> list[np.ndarray]:
    """Pieces of exactly `batch` images (N, ...); the last one is filled with the first images."""
    missing = -len(images) % batch
    full = np.concatenate([images, images[np.arange(missing) % len(images)]]) if missing else images
    return [full[i : i + batch] for i in range(0, len(full), batch)]


def open_data(
    data: Path, judge: Path | None = None, *, labels: Path | None = None, image_member: str | None = None
) -> tuple[ImageSource, ImageSource | None]:
    """The training images and the held-out ones: `judge`, or the test split of `data`, or None without splits.

    The last note of the two says which lines of `labels` name no image of either.
    """
    how: dict[str, Any] = {"labels": labels, "image_member": image_member}
    if judge is not None:
        train, held_out = open_part(data, "train", **how), open_part(judge, "test", **how)
    else:
        try:
            train, held_out = (open_source(data, split=split, **how) for split in ("train", "test"))
        except NoSplit:
            return open_source(data, **how), None
    held_out.note = "; ".join(filter(None, (held_out.note, unmatched_note(train, held_out))))
    return train, held_out


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """How many images each part gets at most."""

    calibration: int = MIN_IMAGES
    bank: int = 1000
    screening: int = SCREENING_IMAGES
    judging: int = JUDGING_IMAGES
    least: int = MIN_IMAGES  # calibration images that must be there


def read_splits(
    train: ImageSource,
    held_out: ImageSource | None,
    preprocessing: Preprocessing,
    *,
    sizes: SplitSizes | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Splits:
    """Read the images of an export; without `held_out` the judging images are a part of `train` kept for that alone.

    `say` is called with a line about images that cannot be read and are left out.

    Raises:
        InputError: too few calibration or judging images, or images that are in both `train` and `held_out`.
    """
    sizes = sizes or SplitSizes()
    require_images(train, held_out, sizes)
    read = _Reader(preprocessing, progress, say)
    wanted = max(sizes.calibration, sizes.bank) + sizes.screening
    order = shuffled(train)
    if held_out is None:
        spare = _spare(len(order), sizes)
        mine = _labelled_first(train, order[: len(order) - spare])
        own = read(train, mine, wanted, note="reading training images")
        rest, held_out = order[len(order) - spare :], train
        seen = set(own.digests)  # duplicates within one data set are left out, not refused
    else:
        mine = _labelled_first(train, order)
        own = read(train, mine, wanted, note="reading training images")
        rest, seen = shuffled(held_out), set()
    judging = read(held_out, rest, sizes.judging, exclude=seen, note="reading held-out images")
    _require_enough(min(len(own), sizes.calibration), len(judging), train, held_out, least=sizes.least)
    require_disjoint(own, judging, where=held_out.name)
    spared = min(sizes.screening, max(0, len(own) - sizes.calibration) // 3)
    # Evenly spread over the rest, so that bank and screening both get labelled images, which come first.
    places = np.linspace(sizes.calibration, len(own) - 1, spared).astype(int) if spared else np.zeros(0, int)
    return Splits(
        calibration=own.part(np.arange(min(sizes.calibration, len(own)))),
        bank=own.part(np.setdiff1d(np.arange(len(own)), places)),
        screening=own.part(places),
        judging=judging,
        # Without the labels of a file: they do not change which images were used.
        source=train.fingerprint if (file := labels_file(train)) is None else file.images,
        train=train,
    )


def require_images(train: ImageSource, held_out: ImageSource | None, sizes: SplitSizes) -> None:
    """Raise InputError where there are too few images, before any is read; duplicates are found only by reading."""
    spare = _spare(len(train), sizes) if held_out is None else 0
    judged = spare if held_out is None else min(len(held_out), sizes.judging)
    judges = train if held_out is None else held_out
    _require_enough(len(train) - spare, judged, train, judges, least=sizes.least)


def _spare(images: int, sizes: SplitSizes) -> int:
    """How many of the training images are kept to judge with, where there is no test split."""
    return min(sizes.judging, max(0, images - sizes.least), images // 2)


def _labelled_first(source: ImageSource, order: np.ndarray) -> np.ndarray:
    """The same order, but images with a label before those without: the gate's probe and bank need labels."""
    bare = np.array([source.label(int(index)) is None for index in order], dtype=bool)
    return np.concatenate([order[~bare], order[bare]])


def _require_enough(calibration: int, judging: int, train: ImageSource, held_out: ImageSource, *, least: int) -> None:
    """Refuse too few calibration images, too few judging images, or both, in one line."""
    short = []
    if calibration < least:
        short.append(f"{train.name} has {calibration} different calibration images and at least {least} are needed")
    if judging < MIN_JUDGING:
        short.append(f"{held_out.name} has {judging} images to judge with and at least {MIN_JUDGING} are needed")
    if short:
        # An fp32 export, which calibrates nothing, takes no such option.
        lowers = calibration < least and least > MIN_JUDGING
        option = " (--calibration-images lowers the number, for a demonstration)" if lowers else ""
        raise InputError(f"{', and '.join(short)}: add images{option}")


def require_disjoint(fitted: Images, judging: Images, *, where: str) -> None:
    """Refuse judging images that were seen in calibration: a quantiser would be judged by what it was fitted to."""
    shared = len(set(fitted.digests) & set(judging.digests))
    if shared:
        raise InputError(f"{where} shares {shared} images with the calibration data: give other images to judge with")


def shuffled(source: ImageSource) -> np.ndarray:
    """A fixed shuffle: any prefix of it is a fair sample of the classes."""
    return np.random.default_rng(_SEED).permutation(len(source))


@dataclass(frozen=True)
class _Reader:
    """Reads images of several sources with one preprocessing."""

    preprocessing: Preprocessing
    progress: Progress
    say: Callable[[str], None]

    def __call__(
        self, source: ImageSource, order: np.ndarray, count: int, *, note: str, exclude: Collection[bytes] = ()
    ) -> Images:
        """The first `count` readable images of `order` that differ from each other and from `exclude`."""
        digests = dict.fromkeys(exclude)
        excluded, failures = len(digests), list[CorruptImage]()
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        batches = read_batches(
            order.tolist(),
            lambda index: self._pixels(source, index),
            batch_size=_READ_BATCH,
            on_skip=lambda _, error: failures.append(error),
        )
        with contextlib.closing(batches):
            for index, array in ((i, a) for indices, arrays in batches for i, a in zip(indices, arrays, strict=True)):
                digest = hashlib.sha256(array.tobytes()).digest()
                if digest in digests:
                    continue
                digests[digest] = None
                pixels.append(array)
                label = source.label(index)
                labels.append(-1 if label is None else label)
                if len(pixels) % 50 == 0:
                    self.progress(len(pixels), min(count, len(order)), note)
                if len(pixels) == count:
                    break
        if failures:
            self.say(
                f"warning: {len(failures)} images of {source.name} cannot be read: left out (first: {failures[0]})"
            )
        stacked = np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocessing.shape), np.uint8)
        return Images(stacked, np.array(labels, dtype=np.int64), tuple(digests)[excluded:], source.classes)

    def _pixels(self, source: ImageSource, index: int) -> np.ndarray:
        """uint8 (3, H, W)."""
        image = resize_and_crop(source.read(index), self.preprocessing)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
