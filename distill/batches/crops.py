"""Multi-crop views of one image: a pure function of (seed, epoch, image index).

From this alone come exact resume at any step, the same run on any number of processes and workers, stored teacher
targets that need no stored crops, and many students on one teacher pass. So there is no random state here: every draw
is read from a counter-based generator at the place (seed, epoch, index).

One decoded image gives all crops. Each is cut and resized in one pass from the decoded image and is small before its
colours change; pixels stay uint8 until they are on the device.

G global crop size   S local crop size   L local crops   B batch
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
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD

_ATTEMPTS = 10  # of RandomResizedCrop, as torchvision's
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_SIGMA = (0.1, 2.0)  # of the blur
# What one crop may draw: 4 an attempt at its box; then flip, jitter, 4 factors, order, gray, blur, sigma, solarize.
_DRAWS = 4 * _ATTEMPTS + 11
_ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
_CIRCLE, _SAME = list(range(256)) * 2, list(range(256))
_LEVELS = np.arange(256)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Crops:
    """All crops of one image, uint8."""

    globals: Pixels  # (2, G, G, 3)
    locals: Pixels  # (L, S, S, 3)


def multi_crop(image: Image.Image, recipe: Recipe, *, epoch: int, index: int) -> Crops:
    """Cut and augment all crops of one RGB image."""
    draws = uniforms(recipe.seed, epoch=epoch, index=index, count=(2 + recipe.local_crops) * _DRAWS)
    rows = draws.reshape(-1, _DRAWS).tolist()
    large = [_crop(image, rows[view], recipe, view) for view in range(2)]
    small = [_crop(image, rows[view], recipe, view) for view in range(2, len(rows))]
    side = recipe.local_crop_size
    return Crops(np.stack(large), np.stack(small) if small else np.empty((0, side, side, 3), dtype=np.uint8))


def uniforms(seed: int, *, epoch: int, index: int, count: int, stream: int = 0) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) at the place (seed, stream, epoch, index) of the Philox generator.

    Philox is counter-based (Salmon et al. 2011): any place is reached at once, and no two places overlap.
    """
    generator = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, 0, index, epoch], dtype=np.uint64)
    )
    return np.random.Generator(generator).random(count)


def normalise(pixels: Tensor, device: torch.device) -> Tensor:
    """Crops (V, B, H, W, 3) uint8 as (V, B, 3, H, W) float32 on the device, with ImageNet's mean and std.

    They stay channels last in memory, which is what convolutions on CPU and GPU want.
    """
    # Whole rows at a time: a broadcast over three channels alone takes sixteen times as long on a CPU.
    width = pixels.shape[3]
    scale = torch.tensor([1 / (255 * s) for s in IMAGENET_STD] * width, device=device)
    shift = torch.tensor([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)] * width, device=device)
    rows = pixels.to(device, non_blocking=True).float().flatten(3)
    return rows.mul_(scale).add_(shift).view(pixels.shape).permute(0, 1, 4, 2, 3)


def crop_box(width: int, height: int, scale: tuple[float, float], draws: list[float]) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (left, top, right, bottom) from 4 draws an attempt; the centre when no attempt fits."""
    area = width * height
    for share, aspect, left, top in zip(*[iter(draws)] * 4, strict=True):
        target = area * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(_LOG_ASPECT[0] + aspect * (_LOG_ASPECT[1] - _LOG_ASPECT[0]))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _crop(image: Image.Image, draws: list[float], recipe: Recipe, view: int) -> Pixels:
    """One crop, (size, size, 3); `view` 0 and 1 are the global ones."""
    is_global = view < 2
    size = recipe.crop_size if is_global else recipe.local_crop_size
    scale = recipe.global_scale if is_global else recipe.local_scale
    box = crop_box(image.width, image.height, scale, draws[: 4 * _ATTEMPTS])
    crop = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    flip, jitter, *factors, order, gray, blur, sigma, solarize = draws[4 * _ATTEMPTS :]
    kind = min(view, 2)
    if flip < recipe.flip_p:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter < recipe.color_p:
        crop = color_jitter(crop, recipe, factors, _ORDERS[int(order * len(_ORDERS))])
    if gray < recipe.gray_p:
        crop = crop.convert("L").convert("RGB")
    if blur < recipe.blur_p[kind]:
        crop = crop.filter(ImageFilter.GaussianBlur(_SIGMA[0] + sigma * (_SIGMA[1] - _SIGMA[0])))
    if solarize < recipe.solarize_p[kind]:
        crop = ImageOps.solarize(crop)
    return np.asarray(crop)


def color_jitter(crop: Image.Image, recipe: Recipe, draws: list[float], order: tuple[int, ...]) -> Image.Image:
    """torchvision's ColorJitter: brightness, contrast, saturation and hue by `draws` in [0, 1), in the order given."""
    limits = [limit * recipe.color_strength for limit in recipe.color]
    for what in order:
        limit = limits[what]
        if not limit:
            continue
        if what == 3:
            limit = min(limit, 0.5)
            crop = shift_hue(crop, limit * (2 * draws[3] - 1))
            continue
        low = max(0.0, 1 - limit)
        factor = low + draws[what] * (1 + limit - low)
        crop = _CHANGES[what](crop, factor)
    return crop


def shift_hue(crop: Image.Image, turn: float) -> Image.Image:
    """The colours turned by `turn` of the hue circle, -0.5 .. 0.5."""
    step = int(turn * 255) % 256
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
