"""The same images twice: what differs is said, whatever it is."""

import numpy as np
import pytest
from PIL import Image

from robx.eval.fidelity.run import REPEAT_IMAGES, repeat_difference
from robx.images.sources import FolderSource
from robx.records import Preprocessing, Student

PRE = Preprocessing(size=18, crop=16)


class Wandering:
    """A Session whose answers to its second and later calls are changed."""

    def __init__(self, change=lambda rows: rows):
        self.bundle = Student(
            timm_name="mean", width=3, preprocessing=PRE, sha256="a" * 64, teacher=None, data=None, recipe={}
        )
        self.calls, self._change, self._out = [], change, None

    def run(self, images):
        self.calls.append(images.copy())
        rows = images.mean(axis=(2, 3))
        rows = rows if len(self.calls) == 1 else self._change(rows)
        if self._out is None:
            self._out = np.empty_like(rows)
        self._out[:] = rows  # as an engine that answers in one buffer of its own
        return self._out


@pytest.fixture
def source(tmp_path):
    for index in range(20):
        path = tmp_path / "images" / "a" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * index, 7, 3)).save(path)
    (tmp_path / "images" / "a" / "001.png").write_bytes(b"no image")
    return FolderSource(tmp_path / "images")


def altered(value):
    def change(rows):
        rows[2, 1] = value if value is not None else rows[2, 1] - np.float32(0.25)
        return rows

    return change


def test_the_same_answers_differ_by_nothing(source):
    session = Wandering()
    found = repeat_difference(session, source)
    assert (found.value, found.n) == (0.0, REPEAT_IMAGES)
    np.testing.assert_array_equal(session.calls[0], session.calls[1])
    assert len(session.calls) == 2 and session.calls[0].shape == (REPEAT_IMAGES, 3, 16, 16)


def test_the_largest_difference_is_told(source):
    assert repeat_difference(Wandering(altered(None)), source).value == pytest.approx(0.25)


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_once_is_no_repetition(source, fault):
    assert repeat_difference(Wandering(altered(fault)), source).value > 1e38


def test_nothing_is_said_of_no_image(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    session = Wandering()
    assert repeat_difference(session, FolderSource(tmp_path)) is None and session.calls == []
