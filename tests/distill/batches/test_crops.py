from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from robx.distill.batches import crops
from robx.distill.recipes import Recipe, override, preset
from robx.image_size import parse_size
from robx.images.crop_box import crop_box
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD

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
    left, top, right, bottom = crop_box(90, 70, plain.global_scale, draws[:40])
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
    plan = np.zeros((), dtype=crops.PLAN)
    plan["order"] = crops.ORDERS.index(order)
    plan["factors"], plan["hue"] = crops.jitter_values(recipe, draws)
    assert np.array_equal(np.asarray(crops.color_jitter(picture(), plan)), np.asarray(expected))


@given(turn=st.floats(-0.5, 0.5))
@settings(max_examples=30, deadline=None)
def test_hue_is_torchvisions(turn: float) -> None:
    ours, theirs = crops.shift_hue(picture(20, 20), int(turn * 255) % 256), tv.adjust_hue(picture(20, 20), turn)
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
    left, top, right, bottom = crop_box(width, height, (low, 1.0), draws)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) > 200 and max(width, height) < 260:
        assert (right - left) * (bottom - top) >= 0.95 * min(low, 0.7) * width * height


def test_areas_are_uniform_and_aspects_log_uniform() -> None:
    areas, aspects = [], []
    for index in range(3000):
        draws = crops.uniforms(1, epoch=0, index=index, count=40).tolist()
        left, top, right, bottom = crop_box(1000, 1000, (0.1, 0.5), draws)
        areas.append((right - left) * (bottom - top) / 1e6)
        aspects.append(np.log((right - left) / (bottom - top)))
    assert abs(np.mean(areas) - 0.3) < 0.01 and min(areas) > 0.098 and max(areas) <= 0.502
    assert abs(np.mean(aspects)) < 0.02 and abs(np.std(aspects) - 2 * np.log(4 / 3) / 12**0.5) < 0.01


@pytest.mark.parametrize(
    ("image", "aspect", "share"),
    [
        ((300, 500), 0.6, 1.0),  # the image has the crop's ratio
        ((640, 480), 16 / 9, 1.0),  # a box of 16:9 and a square cover as much of it
        ((500, 500), 0.5, 0.5),  # a box of 1:2 covers half of a square
        ((480, 640), 2.0, 0.5),  # and of 2:1 half as much of a tall image as a square does
    ],
)
def test_a_box_that_is_not_square_is_torchvisions_with_the_ratio_centred(
    image: tuple[int, int], aspect: float, share: float
) -> None:
    """torchvision draws from its own generator; its draws and the places that it chose are handed on."""
    (width, height), scale, boxes = image, (0.08, 1.0), set()
    for seed in range(60):
        torch.manual_seed(seed)
        picture = torch.zeros(3, height, width)
        top, left, h, w = RandomResizedCrop.get_params(
            picture, [scale[0] * share, scale[1] * share], [aspect * 3 / 4, aspect * 4 / 3]
        )
        torch.manual_seed(seed)
        draws = torch.rand(10, 2).tolist()
        places = (left + 0.5) / (width - w + 1), (top + 0.5) / (height - h + 1)
        found = crop_box(width, height, scale, [x for pair in draws for x in (*pair, *places)], aspect=aspect)
        assert np.abs(np.subtract(found, (left, top, left + w, top + h))).max() <= 1  # torchvision's are float32
        boxes.add(found)
    assert len(boxes) > 50


def test_boxes_vary_however_little_the_image_has_of_the_crops_shape() -> None:
    """With areas relative to the whole image no global crop of 1:4 would fit, and all would be the same centre box."""
    for aspect in (0.25, 4.0):
        draws = [crops.uniforms(1, epoch=0, index=index, count=40).tolist() for index in range(200)]
        boxes = np.array([crop_box(400, 400, (0.4, 1.0), draw, aspect=aspect) for draw in draws])
        shape = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], axis=1)
        assert len(np.unique(boxes, axis=0)) > 190
        assert abs(np.log(shape[:, 0] / shape[:, 1] / aspect)).max() < np.log(4 / 3) + 0.03


@pytest.mark.parametrize(("size", "local"), [("64x32", 48), ((40, 72), "16x48")])
def test_crops_of_any_shape_are_torchvisions(size: Any, local: Any) -> None:
    plain = override(RECIPE, NOTHING | {"crop_size": size, "local_crop_size": local})
    found = crops.multi_crop(picture(), plain, epoch=0, index=3)
    rows = crops.uniforms(plain.seed, epoch=0, index=3, count=5 * 51).reshape(5, 51).tolist()
    for view, (crop, draws) in enumerate(zip([*found.globals, *found.locals], rows, strict=True)):
        height, width = parse_size(size if view < 2 else local)
        scale = plain.global_scale if view < 2 else plain.local_scale
        left, top, right, bottom = crop_box(90, 70, scale, draws[:40], aspect=width / height)
        cropped = tv.crop(picture(), top, left, bottom - top, right - left)
        assert np.array_equal(crop, np.asarray(tv.resize(cropped, [height, width], antialias=True)))


# Of global 1, global 2 and the local crops.
PROBABILITIES = {
    "flip_p": (0.5, 0.5, 0.5),
    "color_p": (0.8, 0.8, 0.8),
    "gray_p": (0.2, 0.2, 0.2),
    "blur_p": (1.0, 0.1, 0.5),
    "solarize_p": (0.0, 0.2, 0.0),
}
NOTHING: dict[str, Any] = {"flip_p": 0.0, "color_p": 0.0, "gray_p": 0.0, "blur_p": [0] * 3, "solarize_p": [0] * 3}


def views_of(image: Image.Image, recipe: Recipe, index: int) -> list[NDArray[np.uint8]]:
    found = crops.multi_crop(image, recipe, epoch=0, index=index)
    return [*found.globals, *found.locals]


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_are_kept_per_view(name: str) -> None:
    # Noise, for on a smooth image a blur of sigma 0.1 .. 0.3 changes no byte.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    one_local, number, changed = override(RECIPE, {"local_crops": 1}), 500, np.zeros(3)
    without = override(one_local, NOTHING)
    having = override(without, {name: getattr(one_local, name)})
    for index in range(number):
        pairs = zip(views_of(noise, without, index), views_of(noise, having, index), strict=True)
        changed += [not np.array_equal(a, b) for a, b in pairs]
    p = np.array(PROBABILITIES[name])
    assert (abs(changed / number - p) <= 4 * np.sqrt(p * (1 - p) / number)).all()


@pytest.mark.parametrize(
    ("values", "done"),
    [
        ({"flip_p": 1.0}, tv.horizontal_flip),
        ({"gray_p": 1.0}, lambda crop: tv.rgb_to_grayscale(crop, 3)),
        ({"solarize_p": [1, 1, 1]}, lambda crop: tv.solarize(crop, 128)),
    ],
)
def test_each_augmentation_alone_is_torchvisions_on_tensors(
    values: dict[str, Any], done: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Where torchvision computes by itself: of images it asks Pillow, as the crops do."""
    plain, changed = override(RECIPE, NOTHING), override(RECIPE, NOTHING | values)
    for index in range(10):
        for old, new in zip(views_of(picture(), plain, index), views_of(picture(), changed, index), strict=True):
            wanted = done(torch.from_numpy(old.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
            assert np.abs(wanted.astype(int) - new).max() <= 1  # Pillow and torch round a grey differently


@pytest.mark.parametrize("index", range(12))
def test_a_crop_is_augmented_as_torchvision_does_in_the_published_order(index: int) -> None:
    """Flip, jitter, grey, blur, solarize, each of them or not, as 12 x 5 crops happen to draw them."""
    recipe = override(
        RECIPE,
        {"flip_p": 0.5, "color_p": 0.7, "gray_p": 0.3, "blur_p": [0.8, 0.5, 0.6], "solarize_p": [0.3, 0.7, 0.5]},
    )
    ways = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    limits = (0.4, 0.4, 0.4, 0.1)  # the published ones at a strength of 0.5
    rows = crops.uniforms(recipe.seed, epoch=0, index=index, count=5 * 51).reshape(5, 51).tolist()
    for view, (found, draws) in enumerate(zip(views_of(picture(), recipe, index), rows, strict=True)):
        scale = recipe.global_scale if view < 2 else recipe.local_scale
        left, top, right, bottom = crop_box(90, 70, scale, draws[:40])
        side = 48 if view < 2 else 32
        expected = tv.resize(tv.crop(picture(), top, left, bottom - top, right - left), [side, side], antialias=True)
        flip, jitter, *factors, order, gray, blur, sigma, solarize = draws[40:]
        if flip < 0.5:
            expected = tv.horizontal_flip(expected)
        if jitter < 0.7:
            for what in list(itertools.permutations(range(4)))[int(24 * order)]:
                turn = limits[what] * (2 * factors[what] - 1)
                expected = ways[what](expected, turn if what == 3 else 1 + turn)
        if gray < 0.3:
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3)
        if blur < (0.8, 0.5, 0.6)[min(view, 2)]:  # Pillow's, as in the releases; torchvision's is another filter
            expected = expected.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * sigma))
        if solarize < (0.3, 0.7, 0.5)[min(view, 2)]:
            expected = tv.solarize(expected, 128)
        assert np.array_equal(found, np.asarray(expected)), f"view {view}"


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
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = (pixels.permute(0, 1, 4, 2, 3).double() / 255 - mean) / std
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
