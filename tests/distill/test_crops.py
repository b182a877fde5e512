from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from robx.distill import crops
from robx.distill.recipes import Recipe, override, preset

RECIPE = override(preset("dino", "vit"), {"crop_size": 48, "local_crop_size": 32, "local_crops": 3})


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def cut(recipe: Recipe, *, epoch: int, index: int) -> bytes:
    found = crops.multi_crop(picture(), recipe, epoch=epoch, index=index)
    return found.globals.tobytes() + found.locals.tobytes()


def _cut_elsewhere(index: int) -> bytes:
    return cut(RECIPE, epoch=2, index=index)


def test_crops_have_their_sizes_and_are_bytes() -> None:
    found = crops.multi_crop(picture(), RECIPE, epoch=0, index=0)
    assert found.globals.shape == (2, 48, 48, 3) and found.locals.shape == (3, 32, 32, 3)
    assert found.globals.dtype == found.locals.dtype == np.uint8
    without = crops.multi_crop(picture(), override(RECIPE, {"local_crops": 0}), epoch=0, index=0)
    assert without.locals.shape == (0, 32, 32, 3)


def test_a_crop_depends_on_seed_epoch_and_index_alone() -> None:
    first = cut(RECIPE, epoch=2, index=5)
    np.random.seed(1)  # noqa: NPY002 (global random state must not matter)
    torch.manual_seed(1)
    for index in (9, 5, 7):
        cut(RECIPE, epoch=2, index=index)
    assert cut(RECIPE, epoch=2, index=5) == first
    others = {
        cut(RECIPE, epoch=3, index=5),
        cut(RECIPE, epoch=2, index=6),
        cut(dataclasses.replace(RECIPE, seed=1), epoch=2, index=5),
    }
    assert len(others | {first}) == 4


def test_another_process_cuts_the_same_crops() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        elsewhere = pool.map(_cut_elsewhere, range(6))
    assert elsewhere == [cut(RECIPE, epoch=2, index=index) for index in range(6)]


def test_more_local_crops_leave_the_others_as_they_are() -> None:
    few = crops.multi_crop(picture(), RECIPE, epoch=1, index=1)
    many = crops.multi_crop(picture(), override(RECIPE, {"local_crops": 5}), epoch=1, index=1)
    assert np.array_equal(few.globals, many.globals) and np.array_equal(few.locals, many.locals[:3])


def test_the_crop_is_torchvisions_when_nothing_else_is_asked_for() -> None:
    plain = override(
        RECIPE, {"color_p": 0.0, "gray_p": 0.0, "flip_p": 0.0, "blur_p": [0, 0, 0], "solarize_p": [0, 0, 0]}
    )
    found = crops.multi_crop(picture(), plain, epoch=0, index=3)
    draws = crops.uniforms(plain.seed, epoch=0, index=3, count=51).tolist()
    left, top, right, bottom = crops.crop_box(90, 70, plain.global_scale, draws[:40])
    cropped = tv.crop(picture(), top, left, bottom - top, right - left)
    expected = tv.resize(cropped, [48, 48], antialias=True)
    assert np.array_equal(found.globals[0], np.asarray(expected))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_colours_change_as_torchvisions_do(order: tuple[int, ...]) -> None:
    recipe = override(RECIPE, {"color_strength": 1.0})
    draws = [0.9, 0.2, 0.7, 0.8]
    expected = picture()
    limits = (0.8, 0.8, 0.8, 0.2)
    ways = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for what in order:
        limit = limits[what]
        low, high = (-limit, limit) if what == 3 else (1 - limit, 1 + limit)
        expected = ways[what](expected, low + draws[what] * (high - low))
    assert np.array_equal(np.asarray(crops.color_jitter(picture(), recipe, draws, order)), np.asarray(expected))


@given(turn=st.floats(-0.5, 0.5))
@settings(max_examples=30, deadline=None)
def test_hue_is_torchvisions(turn: float) -> None:
    ours, theirs = crops.shift_hue(picture(20, 20), turn), tv.adjust_hue(picture(20, 20), turn)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    low=st.floats(0.01, 1),
    index=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_a_box_lies_within_the_image_and_has_its_share(width: int, height: int, low: float, index: int) -> None:
    draws = crops.uniforms(0, epoch=0, index=index, count=40).tolist()
    left, top, right, bottom = crops.crop_box(width, height, (low, 1.0), draws)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) > 200 and max(width, height) < 260:
        assert (right - left) * (bottom - top) >= 0.95 * min(low, 0.7) * width * height


def test_areas_are_uniform_and_aspects_log_uniform() -> None:
    areas, aspects = [], []
    for index in range(3000):
        draws = crops.uniforms(1, epoch=0, index=index, count=40).tolist()
        left, top, right, bottom = crops.crop_box(1000, 1000, (0.1, 0.5), draws)
        areas.append((right - left) * (bottom - top) / 1e6)
        aspects.append(np.log((right - left) / (bottom - top)))
    assert abs(np.mean(areas) - 0.3) < 0.01 and min(areas) > 0.098 and max(areas) <= 0.502
    assert abs(np.mean(aspects)) < 0.02 and abs(np.std(aspects) - 2 * np.log(4 / 3) / 12**0.5) < 0.01


def test_probabilities_are_kept_per_view() -> None:
    base = {"color_p": 0.0, "gray_p": 0.0, "flip_p": 0.0, "local_crops": 1, "solarize_p": [0, 0, 0]}
    plain = override(RECIPE, base | {"blur_p": [0, 0, 0]})
    blurred = override(RECIPE, base | {"blur_p": [1, 0.1, 0.5]})

    def differs(view: int, index: int) -> bool:
        pair = [crops.multi_crop(picture(), recipe, epoch=0, index=index) for recipe in (plain, blurred)]
        a, b = ((c.globals[view] if view < 2 else c.locals[0]) for c in pair)
        return not np.array_equal(a, b)

    shares = [np.mean([differs(view, index) for index in range(150)]) for view in range(3)]
    # A blur of sigma 0.1 .. 0.2 changes no byte.
    assert shares[0] > 0.85 and shares[1] < 0.2 and 0.35 < shares[2] < 0.65


NOTHING = {
    "color_p": 0.0, "gray_p": 0.0, "flip_p": 0.0, "local_crops": 1, "blur_p": [0, 0, 0], "solarize_p": [0, 0, 0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "shares", "done"),
    [
        ({"flip_p": 0.5}, (0.5, 0.5, 0.5), tv.horizontal_flip),
        ({"gray_p": 0.2}, (0.2, 0.2, 0.2), lambda crop: tv.rgb_to_grayscale(crop, 3)),
        ({"solarize_p": [0, 0.2, 0]}, (0.0, 0.2, 0.0), lambda crop: tv.solarize(crop, 128)),
        ({"color_p": 0.8}, (0.8, 0.8, 0.8), None),  # its own tests say what it does
    ],
)
def test_each_augmentation_alone_comes_as_often_as_it_should_and_is_torchvisions(
    values: dict[str, Any], shares: tuple[float, float, float], done: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    plain, changed = override(RECIPE, NOTHING), override(RECIPE, NOTHING | values)
    count, counts = 200, [0, 0, 0]
    for index in range(count):
        before, after = (crops.multi_crop(picture(), recipe, epoch=0, index=index) for recipe in (plain, changed))
        pairs = zip([*before.globals, *before.locals], [*after.globals, *after.locals], strict=True)
        for view, (old, new) in enumerate(pairs):
            if np.array_equal(old, new):
                continue
            counts[view] += 1
            if done is not None:
                wanted = done(torch.from_numpy(old.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
                assert np.abs(wanted.astype(int) - new).max() <= 1  # Pillow and torch round a grey differently
    for found, share in zip(counts, shares, strict=True):
        assert abs(found / count - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_draws_are_uniform_and_far_places_do_not_overlap() -> None:
    def draw(**place: int) -> NDArray[np.float64]:
        return crops.uniforms(7, count=500, **{"epoch": 0, "index": 0} | place)

    values = np.concatenate([draw(index=index) for index in range(40)])
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.std() - 12**-0.5) < 0.01
    assert len(np.unique(values)) == len(values)
    assert not np.isin(draw(epoch=1), values).any() and not np.isin(draw(stream=1), values).any()


def test_normalise_is_the_formula_and_channels_last() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8)
    found = crops.normalise(pixels, torch.device("cpu"))
    mean, std = torch.tensor(crops.MEAN).view(3, 1, 1), torch.tensor(crops.STD).view(3, 1, 1)
    expected = (pixels.permute(0, 1, 4, 2, 3).double() / 255 - mean) / std
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
