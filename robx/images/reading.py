"""Read, preprocess and batch images with a few threads; unreadable images are skipped and reported."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from robx.errors import CorruptImage
from robx.images.decode import crop_pixels, preprocess
from robx.images.protocol import ImageSource

if TYPE_CHECKING:
    from robx.records import Preprocessing

_AHEAD = 1  # batches read before the consumer asks for them
Key = TypeVar("Key")


def decode_threads() -> int:
    """Threads that decode: one for each processor that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def reader(source: ImageSource, preprocessing: Preprocessing) -> Callable[[int], np.ndarray]:
    """The `read` of `read_batches` that gives a source's image as a model's input, float32 (3, H, W)."""
    return lambda index: preprocess(source.read(index), preprocessing)


def pixel_reader(source: ImageSource, preprocessing: Preprocessing) -> Callable[[int], np.ndarray]:
    """The same before the normalisation, uint8 (H, W, 3), for `robx.images.on_device`."""
    return lambda index: crop_pixels(source.read(index), preprocessing)


def read_batches(
    keys: Iterable[Key],
    read: Callable[[Key], np.ndarray],
    *,
    batch_size: int,
    threads: int | None = None,
    on_skip: Callable[[Key, CorruptImage], None] | None = None,
) -> Generator[tuple[list[Key], np.ndarray], None, None]:
    """Read images in the order of `keys` and yield them in full batches; only the last batch may be smaller.

    The arrays of a batch are stacked by one of the reading threads, too. At most three batches are in memory at once,
    besides the one that the consumer holds. Close the iterator to stop early: images not yet started are not read.

    Args:
        keys: what identifies an image, such as its index in a source.
        read: gives one image's array; called by several threads. CorruptImage skips the image; anything else ends the
            iteration with that exception.
        batch_size: images in one batch.
        threads: of reading; None is one for each processor.
        on_skip: called for every skipped image, in order, by the consumer's thread.

    Yields:
        The keys of one batch and their arrays, stacked: (B, ...).
    """
    pool = ThreadPoolExecutor(threads or decode_threads())
    stacking: tuple[list[Key], Future[np.ndarray]] | None = None
    try:
        for names, arrays in _batches(pool, keys, read, batch_size=batch_size, on_skip=on_skip):
            if stacking is not None:
                yield stacking[0], stacking[1].result()
            stacking = names, pool.submit(np.stack, arrays)
        if stacking is not None:
            yield stacking[0], stacking[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(
    pool: ThreadPoolExecutor,
    keys: Iterable[Key],
    read: Callable[[Key], np.ndarray],
    *,
    batch_size: int,
    on_skip: Callable[[Key, CorruptImage], None] | None,
) -> Iterator[tuple[list[Key], list[np.ndarray]]]:
    """The keys and arrays of full batches, and of what is left at the end."""
    names: list[Key] = []
    arrays: list[np.ndarray] = []
    for key, future in _ahead(pool, iter(keys), read, count=(_AHEAD + 1) * batch_size):
        try:
            arrays.append(future.result())
            names.append(key)
        except CorruptImage as error:
            if on_skip is not None:
                on_skip(key, error)
        if len(names) == batch_size:
            yield names, arrays
            names, arrays = [], []
    if names:
        yield names, arrays


def _ahead(
    pool: ThreadPoolExecutor, keys: Iterator[Key], read: Callable[[Key], np.ndarray], *, count: int
) -> Iterator[tuple[Key, Future[np.ndarray]]]:
    """Every key with the future of its image, in order, while at most `count` of them wait or are being read."""
    waiting = deque((key, pool.submit(read, key)) for key in itertools.islice(keys, count))
    while waiting:
        yield waiting.popleft()
        waiting.extend((key, pool.submit(read, key)) for key in itertools.islice(keys, 1))
