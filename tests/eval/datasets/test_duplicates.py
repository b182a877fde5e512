"""Doubles are found under any name, size and quality; other images are not taken for them."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageOps

from robx.eval.datasets import duplicates
from robx.eval.datasets.duplicates import LOOK, LookAlikes, look, warning_in
from robx.images.decode import crop_pixels
from robx.images.scenes import make_scene, render
from robx.records import Preprocessing, to_json

PRE = Preprocessing(size=73, crop=64)


def scene(index, size=128):
    return render(make_scene(5, index), size=size)


def looks(images):
    return np.stack([look(crop_pixels(image, PRE)) for image in images])


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


@pytest.fixture(scope="module")
def bank():
    return looks([scene(i) for i in range(60)])


def count(bank, images):
    found = duplicates.look_alikes(bank, looks(images))
    assert found.images == len(images)
    return found.identical, found.near


def test_the_same_pixels_are_found_under_any_name(bank):
    assert count(bank, [scene(7), scene(100), scene(7), scene(12)]) == (3, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: jpeg(image, 60),
        lambda image: image.resize((96, 96), Image.Resampling.BICUBIC),
        lambda image: ImageOps.autocontrast(image, cutoff=1),
        lambda image: Image.eval(image, lambda v: min(255, int(v * 0.8 + 10))),
    ],
    ids=["recompressed", "resized", "contrast", "darker"],
)
def test_a_copy_that_was_stored_again_is_near(bank, change):
    copies = [change(scene(i)) for i in range(10, 20)]
    identical, near = count(bank, copies)
    assert identical == 0 and near >= 9


def test_other_scenes_are_neither(bank):
    identical, near = count(bank, [scene(i) for i in range(200, 260)])
    assert (identical, near) == (0, 0)


def test_one_that_is_the_same_is_not_counted_as_near_too(bank):
    assert count(bank, [scene(3), jpeg(scene(3), 60)]) == (1, 1)


def test_blank_images_match_only_blank_images_of_the_same_colour(bank):
    white, grey = Image.new("RGB", (80, 80), "white"), Image.new("RGB", (80, 80), "grey")
    assert count(bank, [white, grey]) == (0, 0)
    assert count(np.concatenate([bank, looks([white])]), [white, grey]) == (1, 0)


def test_repeated_pixels_and_their_labels_are_counted(bank):
    rows = bank[[0, 1, 2, 0, 1, 0, 3]]
    assert duplicates.repeats(rows, np.array([0, 1, 2, 0, 1, 0, 3])) == (3, 0)
    assert duplicates.repeats(rows, np.array([0, 1, 2, 5, 1, -1, 3])) == (3, 2)  # one without a label contradicts none
    assert duplicates.repeats(bank[:3], np.array([0, 0, 0])) == (0, 0)


def test_blocks_of_any_size_find_the_same(bank, monkeypatch):
    test = looks([scene(59), jpeg(scene(0), 60), jpeg(scene(31), 60), scene(300)])
    whole = duplicates.look_alikes(bank, test)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    assert duplicates.look_alikes(bank, test) == whole == LookAlikes(images=4, identical=1, near=2)


@pytest.mark.parametrize("side", [1, 5, 16, 17, 224])
def test_the_thumbnail_is_the_mean_of_each_cell(side):
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    found = look(pixels)
    assert found.shape == (LOOK,) and found.dtype == np.uint8
    edges = [i * side // 16 for i in range(17)]
    grey = pixels.mean(2)
    cells = np.array(
        [
            [grey[a : max(b, a + 1), c : max(d, c + 1)].mean() for c, d in itertools.pairwise(edges)]
            for a, b in itertools.pairwise(edges)
        ]
    )
    spread = np.ptp(cells)
    expected = (cells - cells.min()) * (255 / spread if spread else 0)
    np.testing.assert_allclose(found[8:].reshape(16, 16), expected, atol=0.51)


def test_a_record_keeps_its_warning_and_strangers_settings_have_none():
    found = LookAlikes(images=50, identical=2, near=3)
    assert warning_in({"look_alikes": to_json(found)}) == found.warning
    assert "5 of 50" in found.warning and "2 with the same pixels" in found.warning
    for settings in ({}, {"look_alikes": None}, {"look_alikes": "x"}, {"look_alikes": {"near": "many"}}):
        assert warning_in(settings) == ""
    assert LookAlikes(images=50, identical=0, near=0).warning == ""


def test_a_large_set_is_sampled_for_near_copies_and_says_so(bank, monkeypatch):
    copies = [*(jpeg(scene(i), 60) for i in range(10, 20)), scene(3), scene(4)]
    whole = duplicates.look_alikes(bank, looks(copies))
    assert (whole.identical, whole.near, whole.checked) == (2, 10, None)
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 60 * 4)
    found = duplicates.look_alikes(bank, looks(copies))
    assert found.identical == 2 and found.checked == 4 and 2 <= found.near <= 4
    assert found == duplicates.look_alikes(bank, looks(copies))
    assert found.warning.startswith(f"at least {2 + found.near} of 12 test images look like")
    assert warning_in({"look_alikes": to_json(found)}) == found.warning
