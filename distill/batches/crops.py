"""Multi-crop views of one image: a pure function of (seed, epoch, image index).

This gives exact resume at any step, identical runs on any number of processes and workers, stored teacher targets
without stored crops, and several students per teacher pass. There is no random state: every draw is read from a
counter-based generator at position (seed, epoch, index).

All crops come from one decoded image. Each is cropped and resized in one pass before its colours change; pixels stay
uint8 until they are on the device.

Gh, Gw height and width of a global crop, Sh, Sw of a local one   M global and L local crops   B batch
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from robx.distill.recipes import Recipe
from robx.image_size import Shape
from robx.images.crop_box import DRAWS as BOX_DRAWS
from robx.images.crop_box import crop_box
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD

_SIGMA = (0.1, 2.0)  # of the blur
# Draws per crop: those of its box; then flip, jitter, 4 factors, order, gray, blur, sigma, solarize.
_DRAWS = BOX_DRAWS + 11
ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
_CIRCLE, _SAME = list(range(256)) * 2, list(range(256))
_LEVELS = np.arange(256)

Pixels = NDArray[np.uint8]

# Everything that is drawn for one crop; a batch has one record per image and crop.
PLAN = np.dtype(
    [
        ("box", np.int32, 4),  # left, top, right, bottom in the decoded image
        ("flip", np.bool_),
        ("order", np.int8),  # of the colour jitter, an index into ORDERS; -1: no jitter
        ("factors", np.float32, 3),  # brightness, contrast, saturation; 1 changes nothing
        ("hue", np.int16),  # steps of 256 around the hue circle; -1: unchanged
        ("gray", np.bool_),
        ("sigma", np.float32),  # of the blur, pixels; 0: no blur
        ("solarize", np.bool_),
    ]
)


@dataclass(frozen=True)
class Crops:
    """All crops of one image, uint8."""

    globals: Pixels  # (M, Gh, Gw, 3)
    locals: Pixels  # (L, Sh, Sw, 3)


@dataclass(frozen=True)
class Planned:
    """One decoded image and the plans of its crops, which are made elsewhere."""

    pixels: Pixels  # (H, W, 3)
    plans: NDArray[np.void]  # PLAN records (M + L,)
    globals: int  # M, the first of the plans
    shapes: tuple[Shape, Shape]  # of the global and the local crops


def multi_crop(image: Image.Image, recipe: Recipe, *, epoch: int, index: int) -> Crops:
    """Cut and augment all crops of one RGB image with Pillow."""
    plans = plan_crops(image.width, image.height, recipe, epoch=epoch, index=index)
    shape = recipe.local_crop_shape
    large = [apply_plan(image, plan, recipe.crop_shape) for plan in plans[: recipe.global_crops]]
    small = [apply_plan(image, plan, shape) for plan in plans[recipe.global_crops :]]
    return Crops(np.stack(large), np.stack(small) if small else np.empty((0, *shape, 3), dtype=np.uint8))


def plan_image(pixels: Pixels, recipe: Recipe, *, epoch: int, index: int) -> Planned:
    """Draw the plans of all crops of one image, (H, W, 3), without making the crops.

    An image more than twice as large as its most magnified crop needs is first reduced by 2, 4 or 8, so that fewer
    pixels are sent to the device and memory is bounded.
    """
    surplus = min(pixels.shape[:2]) / needed_side(recipe)
    if surplus >= 2:
        pixels = np.asarray(Image.fromarray(pixels).reduce(2 ** min(3, int(math.log2(surplus)))))
    height, width, _ = pixels.shape
    plans = plan_crops(width, height, recipe, epoch=epoch, index=index)
    return Planned(pixels, plans, recipe.global_crops, (recipe.crop_shape, recipe.local_crop_shape))


def needed_side(recipe: Recipe) -> int:
    """Pixels of an image's shorter side from which on its smallest crops are not magnified."""
    kinds = ((recipe.crop_shape, recipe.global_scale), (recipe.local_crop_shape, recipe.local_scale))
    return math.ceil(max(max(shape) / math.sqrt(scale[0]) for shape, scale in kinds[: 2 if recipe.local_crops else 1]))


def plan_crops(width: int, height: int, recipe: Recipe, *, epoch: int, index: int) -> NDArray[np.void]:
    """PLAN records (M + L,) of the crops of an image of `width` x `height` pixels, the global ones first."""
    number = recipe.global_crops + recipe.local_crops
    rows = uniforms(recipe.seed, epoch=epoch, index=index, count=number * _DRAWS).reshape(-1, _DRAWS).tolist()
    return np.array([_plan(width, height, row, recipe, view) for view, row in enumerate(rows)], dtype=PLAN)


def uniforms(seed: int, *, epoch: int, index: int, count: int, stream: int = 0) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) at position (seed, stream, epoch, index) of the Philox generator.

    Philox is counter-based (Salmon et al. 2011): every position is reached directly, and no two overlap.
    """
    generator = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, 0, index, epoch], dtype=np.uint64)
    )
    return np.random.Generator(generator).random(count)


def normalise(pixels: Tensor, device: torch.device) -> Tensor:
    """Crops (V, B, H, W, 3) of values 0 .. 255 as (V, B, 3, H, W) float32 on the device, by ImageNet's mean and std.

    They stay in channels-last memory format, the fast layout for convolutions on CPU and GPU.
    """
    # Whole rows at a time: broadcasting over only three channels takes sixteen times as long on a CPU.
    width = pixels.shape[3]
    scale = to_device(np.array([1 / (255 * s) for s in IMAGENET_STD] * width, np.float32), device)
    offsets = [-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    shift = to_device(np.array(offsets * width, np.float32), device)
    rows = (
        pixels.to(device, non_blocking=True)
        .to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        .flatten(3)
    )
    return rows.mul_(scale).add_(shift).view(pixels.shape).permute(0, 1, 4, 2, 3)


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A small array on the device; the host does not wait for a GPU, as in ``torch.tensor(..., device=...)``."""
    found = torch.from_numpy(np.array(values, order="C"))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _plan(width: int, height: int, draws: list[float], recipe: Recipe, view: int) -> tuple[object, ...]:
    """One PLAN record; the first views are the global crops."""
    is_global = view < recipe.global_crops
    scale = recipe.global_scale if is_global else recipe.local_scale
    rows, columns = recipe.crop_shape if is_global else recipe.local_crop_shape
    box = crop_box(width, height, scale, draws[:BOX_DRAWS], aspect=columns / rows)
    flip, jitter, *factors, order, gray, blur, sigma, solarize = draws[BOX_DRAWS:]
    kind = view if is_global else 2
    return (
        box,
        flip < recipe.flip_p,
        int(order * len(ORDERS)) if jitter < recipe.color_p else -1,
        *jitter_values(recipe, factors),
        gray < recipe.gray_p,
        _SIGMA[0] + sigma * (_SIGMA[1] - _SIGMA[0]) if blur < recipe.blur_p[kind] else 0.0,
        solarize < recipe.solarize_p[kind],
    )


def jitter_values(recipe: Recipe, draws: list[float]) -> tuple[tuple[float, float, float], int]:
    """torchvision's ColorJitter from 4 draws in [0, 1): the factors and the hue's steps, as PLAN has them."""
    *limits, hue = (limit * recipe.color_strength for limit in recipe.color)
    low = [max(0.0, 1 - limit) for limit in limits]
    factors = [least + draw * (1 + limit - least) for least, draw, limit in zip(low, draws, limits, strict=False)]
    turn = min(hue, 0.5) * (2 * draws[3] - 1)
    return (factors[0], factors[1], factors[2]), int(turn * 255) % 256 if hue else -1


def apply_plan(image: Image.Image, plan: np.void, shape: Shape) -> Pixels:
    """Cut and augment one crop of `shape` (height, width) with Pillow: uint8 (height, width, 3)."""
    crop = image.crop(tuple(plan["box"].tolist())).resize(shape[::-1], Image.Resampling.BILINEAR)
    if plan["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan["order"] >= 0:
        crop = color_jitter(crop, plan)
    if plan["gray"]:
        crop = crop.convert("L").convert("RGB")
    if plan["sigma"] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(float(plan["sigma"])))
    if plan["solarize"]:
        crop = ImageOps.solarize(crop)
    return np.asarray(crop)


def color_jitter(crop: Image.Image, plan: np.void) -> Image.Image:
    """torchvision's ColorJitter: brightness, contrast, saturation and hue in the plan's order."""
    factors = plan["factors"].tolist()
    for what in ORDERS[plan["order"]]:
        if what < 3:
            crop = _CHANGES[what](crop, factors[what])
        elif plan["hue"] >= 0:
            crop = shift_hue(crop, int(plan["hue"]))
    return crop


def shift_hue(crop: Image.Image, step: int) -> Image.Image:
    """Turn the hue by `step` of 256."""
    table = _CIRCLE[step : step + 256] + _SAME + _SAME  # one pass over the three bands
    return crop.convert("HSV").point(table).convert("RGB")


def change_contrast(crop: Image.Image, factor: float) -> Image.Image:
    """Away from (factor > 1) or towards the mean grey level; ImageEnhance.Contrast without its slow statistics."""
    grey = crop.convert("L")
    mean = int(float(_LEVELS @ grey.histogram()) / (crop.width * crop.height) + 0.5)
    return Image.blend(Image.new("RGB", crop.size, (mean, mean, mean)), crop, factor)


def change_saturation(crop: Image.Image, factor: float) -> Image.Image:
    """Away from (factor > 1) or towards grey."""
    return Image.blend(crop.convert("L").convert("RGB"), crop, factor)


def change_brightness(crop: Image.Image, factor: float) -> Image.Image:
    """Away from (factor > 1) or towards black."""
    return Image.blend(Image.new("RGB", crop.size), crop, factor)


_CHANGES = (change_brightness, change_contrast, change_saturation)
