"""The images that a benchmark runs: the user's, or rendered scenes that are the same everywhere."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from robx.errors import InputError
from robx.images.decode import decode, preprocess
from robx.images.reading import read_batches
from robx.images.scenes import make_scene, render
from robx.images.sources import ImageSource, open_source
from robx.records import MAX_BATCH_BYTES, Preprocessing
from robx.runtime.bench.profiles import BenchSettings

COUNT = 64  # distinct images, so that caches and branch predictors cannot adapt to one
_MAX_BYTES = 2**29  # of all images together
_SIZE = 384  # pixels per side of a rendered scene, about the size of an ImageNet photo


@dataclass(frozen=True)
class Inputs:
    """Preprocessed images and the time that each took."""

    images: np.ndarray  # float32 (N, 3, H, W)
    preprocess_ns: np.ndarray  # int64 (N,): decoding, resizing, normalising
    name: str


def open_images(settings: BenchSettings, say: Callable[[str], None]) -> ImageSource | None:
    """The user's images; None without any. `say` is called with a line about files that are left out."""
    if settings.data is None:
        return None
    source = open_source(Path(settings.data), image_member=settings.image_member)
    if source.note:
        say(source.note)
    return source


def load_inputs(
    preprocessing: Preprocessing, source: ImageSource | None, *, count: int = COUNT, batch: int = 1
) -> Inputs:
    """`count` images, evenly spread over the source, or rendered scenes without one; repeated if there are fewer.

    Their number is rounded up to whole batches, and smaller for images so large that they would fill the memory.

    Raises:
        InputError: no image of the source can be decoded, or a batch does not fit into memory.
    """
    image_bytes, size = preprocessing.image_bytes, "x".join(map(str, preprocessing.shape[::-1]))
    if batch * image_bytes > MAX_BATCH_BYTES:
        most = MAX_BATCH_BYTES // image_bytes
        raise InputError(f"a batch of {batch} images of {size} px is too large: use at most {most}")
    count = batch * min(-(-count // batch), max(1, _MAX_BYTES // (batch * image_bytes)))
    readers = _from_source(source, count) if source is not None else _drawn(count)
    times: dict[int, int] = {}
    skipped = 0

    def read(numbered: tuple[int, Callable[[], Image.Image]]) -> np.ndarray:
        number, decoded = numbered
        start = time.perf_counter_ns()
        pixels = preprocess(decoded(), preprocessing)
        times[number] = time.perf_counter_ns() - start
        return pixels

    def skip(*_: object) -> None:
        nonlocal skipped
        skipped += 1

    # One thread: several would slow each other down.
    batches = read_batches(enumerate(readers), read, batch_size=1, threads=1, on_skip=skip)
    arrays = [pixels for _, (pixels,) in batches]
    if not arrays:
        raise InputError(
            f"none of the images of {source.name if source else 'the set'} can be decoded: give other images"
        )
    images = np.stack([arrays[i % len(arrays)] for i in range(count)])
    name = source.name if source is not None else f"rendered scenes, {_SIZE} x {_SIZE} JPEG"
    if skipped:
        name += f" ({skipped} unreadable images skipped)"
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
