"""The one loop that reads images: order, full batches, what is skipped, and how far it reads ahead."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

from robx.errors import CorruptImage, UnreadableImage
from robx.images.reading import read_batches


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_are_full_and_in_order_without_skipped_images(threads: int) -> None:
    def read(index: int) -> np.ndarray:
        time.sleep(0.002 * (index % 3))  # threads finish in another order than they start
        if index % 4 == 1:
            raise CorruptImage(f"image {index}")
        return np.full((2, 2), index)

    skipped: list[tuple[int, str]] = []
    found = list(
        read_batches(
            range(20), read, batch_size=6, threads=threads, on_skip=lambda key, error: skipped.append((key, str(error)))
        )
    )
    kept = [i for i in range(20) if i % 4 != 1]
    assert [keys for keys, _ in found] == [kept[:6], kept[6:12], kept[12:]]
    assert [arrays[:, 0, 0].tolist() for _, arrays in found] == [keys for keys, _ in found]
    assert skipped == [(i, f"image {i}") for i in (1, 5, 9, 13, 17)]


def test_keys_may_be_any_values_and_may_be_empty() -> None:
    assert list(read_batches([], np.zeros, batch_size=3)) == []
    assert [keys for keys, _ in read_batches("abc", lambda _: np.zeros(1), batch_size=2)] == [["a", "b"], ["c"]]


def test_only_a_few_batches_are_read_ahead() -> None:
    lock, started = threading.Lock(), []

    def read(index: int) -> np.ndarray:
        with lock:
            started.append(index)
        return np.zeros(2)

    with contextlib.closing(read_batches(range(100), read, batch_size=10)) as batches:
        next(batches)
        time.sleep(0.05)
        assert len(started) <= 40  # the batch that was yielded, and at most three more
    assert len(started) <= 40


@pytest.mark.parametrize("error", [RuntimeError("a defect"), MemoryError("none left")])
def test_an_unexpected_exception_is_raised(error: BaseException) -> None:
    def read(index: int) -> np.ndarray:
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(read_batches(range(10), read, batch_size=4))


def test_an_unreadable_file_is_skipped_as_well() -> None:
    def read(index: int) -> np.ndarray:
        raise UnreadableImage("input/output error")

    seen: list[CorruptImage] = []
    assert not list(read_batches(range(3), read, batch_size=2, on_skip=lambda _, error: seen.append(error)))
    assert [type(error) for error in seen] == [UnreadableImage] * 3
