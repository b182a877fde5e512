"""The images that a benchmark runs: the user's, or rendered scenes that are the same everywhere."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from robx.errors import InputError
from robx.images.decode import decode, preprocess
from robx.images.reading import read_batches
from robx.images.scenes import make_scene, render
from robx.images.sources import ImageSource
from robx.records import Preprocessing

COUNT = 64  # distinct images, so that caches and branch predictors cannot adapt to one
_SIZE = 384  # pixels per side of a rendered scene, about the size of an ImageNet photo


@dataclass(frozen=True)
class Inputs:
    """Preprocessed images and the time that each took."""

    images: np.ndarray  # float32 (N, 3, H, W)
    preprocess_ns: np.ndarray  # int64 (N,): decoding, resizing, normalising
    name: str


def load_inputs(preprocessing: Preprocessing, source: ImageSource | None, *, count: int = COUNT) -> Inputs:
    """`count` images, evenly spread over the source, or rendered scenes without one; repeated if there are fewer.

    Raises:
        InputError: no image of the source can be decoded.
    """
    readers = _from_source(source, count) if source is not None else _drawn(count)
    times: dict[int, int] = {}

    def read(numbered: tuple[int, Callable[[], Image.Image]]) -> np.ndarray:
        number, decoded = numbered
        start = time.perf_counter_ns()
        pixels = preprocess(decoded(), preprocessing)
        times[number] = time.perf_counter_ns() - start
        return pixels

    # One thread: several would slow each other down.
    arrays = [pixels for _, (pixels,) in read_batches(enumerate(readers), read, batch_size=1, threads=1)]
    if not arrays:
        raise InputError(
            f"none of the images of {source.name if source else 'the set'} can be decoded: give other images"
        )
    images = np.stack([arrays[i % len(arrays)] for i in range(count)])
    name = source.name if source is not None else f"rendered scenes, {_SIZE} x {_SIZE} JPEG"
    return Inputs(images, np.array(list(times.values()), dtype=np.int64), name)


def _drawn(count: int) -> Iterator[Callable[[], Image.Image]]:
    for seed, data in enumerate(_scenes(count)):
        yield functools.partial(decode, data, name=f"scene {seed}")


@functools.cache
def _scenes(count: int) -> tuple[bytes, ...]:
    """JPEG files of scenes; drawn small and enlarged, since drawing takes most of the time."""
    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        scene = render(make_scene(0, seed), size=_SIZE // 4).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        scene.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return tuple(files)


def _from_source(source: ImageSource, count: int) -> Iterator[Callable[[], Image.Image]]:
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        yield functools.partial(source.read, int(index))
