"""Crops on the device against Pillow: each operation, whole crops, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch import Tensor

from robx.distill.batches import crops, device_crops
from robx.distill.recipes import Recipe, override, preset

SMALL = {"crop_size": 48, "local_crop_size": 32, "local_crops": 3}


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with noise, so that neither flat areas nor noise alone decide."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(smooth).astype(int) + rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def difference(found: Tensor, expected: Image.Image) -> np.ndarray:
    return np.abs(found[0].permute(1, 2, 0).numpy() - np.asarray(expected).astype(float))


def value(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float32)[:, None, None, None]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation"])
@given(factor=st.floats(0, 2, width=32), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_brightness_contrast_and_saturation_are_pillows(what: str, factor: float, seed: int) -> None:
    ours, theirs = (getattr(module, f"change_{what}") for module in (device_crops, crops))
    assert difference(ours(tensor(noise(seed)), value(factor)), theirs(noise(seed), factor)).max() == 0


@given(step=st.integers(0, 255), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_hue_is_pillows(step: int, seed: int) -> None:
    found = device_crops.shift_hue(tensor(noise(seed)), value(step))
    assert difference(found, crops.shift_hue(noise(seed), step)).max() == 0


def test_hue_leaves_grey_and_black_alone() -> None:
    grey = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(4, axis=1))
    assert difference(device_crops.shift_hue(tensor(grey), value(77)), grey).max() == 0


@given(sigma=st.floats(0.125, 2, width=32), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_blur_is_pillows(sigma: float, seed: int) -> None:
    found = difference(
        device_crops.gaussian_blur(tensor(noise(seed)), value(sigma)),
        noise(seed).filter(ImageFilter.GaussianBlur(sigma)),
    )
    assert found.max() <= 1 and found.mean() < 0.05  # a few ties are rounded to the other side


@given(
    width=st.integers(2, 300),
    height=st.integers(2, 300),
    shape=st.sampled_from([(16, 16), (33, 33), (64, 64), (64, 24), (17, 50)]),
    corner=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    extent=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=60, deadline=None)
def test_a_cut_is_pillows_within_one_level(
    width: int, height: int, shape: tuple[int, int], corner: tuple[float, float], extent: tuple[float, float]
) -> None:
    left, top = int(corner[0] * width), int(corner[1] * height)
    right, bottom = left + 1 + int(extent[0] * (width - left - 1)), top + 1 + int(extent[1] * (height - top - 1))
    image = photo(width, height, seed=width)
    plans = np.zeros((1, 1), dtype=crops.PLAN)
    plans["box"], plans["order"] = (left, top, right, bottom), -1
    found = device_crops.device_crops([torch.from_numpy(np.array(image))], [(plans, shape)])[0]
    expected = image.crop((left, top, right, bottom)).resize(shape[::-1], Image.Resampling.BILINEAR)
    assert difference(found[0], expected).max() <= 1


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        *(("dino", {}), ("ibot", {}), ("msn", {}), ("swav", {})),
        ("dino", {"crop_size": "64x32", "local_crop_size": "24x40"}),
    ],
)
def test_whole_crops_agree_with_pillows(method: str, sizes: dict[str, str]) -> None:
    recipe = override(preset(method, "vit"), SMALL | sizes)
    images, plans, pillow = batch_of(recipe, 40)
    kinds = (("globals", slice(0, 2), recipe.crop_shape), ("locals", slice(2, None), recipe.local_crop_shape))
    for name, rows, shape in kinds:
        found = device_crops.device_crops(images, [(plans[rows], shape)])[0].permute(0, 1, 3, 4, 2).numpy()
        expected = np.stack([getattr(one, name) for one in pillow], axis=1).astype(float)
        per_crop = np.abs(found - expected).mean(axis=(2, 3, 4))
        # Pillow goes through the columns of a tall crop first more often; see the next test.
        assert found.shape == expected.shape and per_crop.max() < 1.5 and per_crop.mean() < (0.1 if sizes else 0.05)
        assert (found == found.round()).all() and found.min() >= 0 and found.max() <= 255


def test_a_tall_cut_is_pillows_rows_first_to_the_last_bit() -> None:
    images, plans, _ = batch_of(override(preset("dino", "vit"), SMALL | {"crop_size": "64x32"}), 20)
    plans = plans[:2].copy()
    for name in ("flip", "gray", "sigma", "solarize"):
        plans[name] = 0
    plans["order"] = -1
    found = device_crops.device_crops(images, [(plans, (64, 32))])[0]
    for at, image in enumerate(images):
        for view in range(2):
            cut = Image.fromarray(image.numpy()).crop(tuple(plans["box"][view, at].tolist()))
            rows_first = cut.resize((32, cut.height), Image.Resampling.BILINEAR)
            expected = rows_first.resize((32, 64), Image.Resampling.BILINEAR)
            assert difference(found[view, at][None], expected).max() == 0


def test_a_crop_does_not_depend_on_its_batch() -> None:
    recipe = override(preset("dino", "vit"), SMALL)
    images, plans, _ = batch_of(recipe, 19)  # more than one chunk, of images of many sizes
    whole = device_crops.device_crops(images, [(plans[:2], (48, 48))])[0]
    for at in (0, 7, 18):
        alone = device_crops.device_crops(images[at : at + 1], [(plans[:2, at : at + 1], (48, 48))])[0]
        assert torch.equal(alone[:, 0], whole[:, at])


def batch_of(recipe: Recipe, number: int) -> tuple[list[Tensor], np.ndarray, list[crops.Crops]]:
    rng = np.random.default_rng(3)
    images = [photo(int(rng.integers(20, 320)), int(rng.integers(20, 240)), i) for i in range(number)]
    plans = [crops.plan_crops(*image.size, recipe, epoch=1, index=i) for i, image in enumerate(images)]
    pillow = [crops.multi_crop(image, recipe, epoch=1, index=i) for i, image in enumerate(images)]
    return [torch.from_numpy(np.array(image)) for image in images], np.stack(plans, axis=1), pillow
