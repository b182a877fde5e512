"""The crops of `crops.py` on the training device: the same draws and boxes, computed in batches.

With ``augment = "device"`` the workers only decode; cutting, resizing and all colour operations are batched tensor
operations on the device. They reproduce Pillow's own arithmetic: every operation gives Pillow's pixels, but for the
resizing, where some Pillow releases go through the columns first and single values then differ by 1 of 255. Resampling
weights are integers, split so that float32 and TF32 matrix products are exact: a crop stays a pure function of
(seed, epoch, image index), whatever batch or process it is computed in.

B images   V crops of one size of each   Sh, Sw their height and width   N = V * B   H, W of the decoded images
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robx.distill.batches.crops import ORDERS, to_device
from robx.image_size import Shape

_PIXELS = 1 << 23  # of padded images that are resized at a time; bounds the memory
_BITS = 22  # of Pillow's fixed-point resampling weights
_HALF = 11  # bits of the upper and the lower half of a weight: products with pixels are exact even in TF32
_BLUR_BITS = 24
_PASSES = 3  # of the extended box blur that Pillow approximates a Gaussian with
_REACH = 2  # taps on each side of one box: enough up to a standard deviation of 2


def device_crops(images: Sequence[Tensor], kinds: Sequence[tuple[NDArray[np.void], Shape]]) -> list[Tensor]:
    """Cut, resize and augment all crops.

    Args:
        images: uint8 (H, W, 3) tensors on the device, B of them.
        kinds: for each size of crops, their `crops.PLAN` records (V, B), and height and width in pixels.

    Returns:
        For each kind uint8 values as float32, (V, B, 3, Sh, Sw), on the device of the images.
    """
    cuts: list[list[Tensor]] = [[] for _ in kinds]
    for part in _chunks(images):
        padded = _padded(images[part])
        for (plans, shape), cut in zip(kinds, cuts, strict=True):
            cut.append(_cut(padded, plans["box"][:, part], shape))
    joined = (torch.cat(cut, dim=1) for cut in cuts)
    return [
        augment(cut.flatten(0, 1), plans.reshape(-1)).view(cut.shape)
        for cut, (plans, _) in zip(joined, kinds, strict=True)
    ]


def augment(crops: Tensor, plans: NDArray[np.void]) -> Tensor:
    """Flip, colour jitter, greyscale, blur and solarise crops (N, 3, Sh, Sw) of integer values as `plans` (N,) says."""
    for wanted, values, change in _steps(plans):
        rows = np.flatnonzero(wanted)
        if len(rows):
            where = to_device(rows, crops.device)
            given = to_device(values[rows].astype(np.float32), crops.device)[:, None, None, None]
            crops = crops.index_copy(0, where, change(crops.index_select(0, where), given))
    return crops


Step = tuple[NDArray[np.bool_], NDArray[Any], Callable[[Tensor, Tensor], Tensor]]


def _steps(plans: NDArray[np.void]) -> Iterator[Step]:
    """(which crops, their parameter, operation) in the order of application."""
    yield plans["flip"], plans["flip"], lambda x, _: x.flip(-1)
    orders = np.array([*ORDERS, (-1,) * 4], dtype=np.int8)[plans["order"]]
    jitter = (change_brightness, change_contrast, change_saturation)
    for place in range(4):
        for what, change in enumerate(jitter):
            yield orders[:, place] == what, plans["factors"][:, what], change
        yield (orders[:, place] == len(jitter)) & (plans["hue"] >= 0), plans["hue"], shift_hue
    yield plans["gray"], plans["gray"], lambda x, _: luminance(x).expand_as(x)
    yield plans["sigma"] > 0, plans["sigma"], gaussian_blur
    yield plans["solarize"], plans["solarize"], lambda x, _: torch.where(x < 128, x, 255 - x)


# ------------------------------------------------------------------------------------------------------ cut and resize


def _chunks(images: Sequence[Tensor]) -> Iterator[slice]:
    """Runs of images that, padded to the tallest and the widest of them, have at most _PIXELS pixels; at least one."""
    first, height, width = 0, 0, 0
    for at, image in enumerate(images):
        height, width = max(height, image.shape[0]), max(width, image.shape[1])
        if at > first and (at + 1 - first) * height * width > _PIXELS:
            yield slice(first, at)
            first, height, width = at, image.shape[0], image.shape[1]
    yield slice(first, len(images))


def _padded(images: Sequence[Tensor]) -> Tensor:
    """Images (H, W, 3) of any sizes as float32 (B, 3, H, W) of the tallest and the widest."""
    height, width = max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    padded = torch.zeros(len(images), 3, height, width, device=images[0].device)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
    return padded


def _cut(padded: Tensor, boxes: NDArray[np.int32], shape: Shape) -> Tensor:
    """Pillow's ``crop(box).resize((Sw, Sh), BILINEAR)``, rows first.

    (B, 3, H, W), boxes (V, B, 4) -> (V, B, 3, Sh, Sw).
    """
    number, _, height, width = padded.shape
    tall, wide = shape
    device = padded.device
    if not len(boxes):
        return torch.empty(0, number, 3, tall, wide, device=device)
    box = to_device(boxes.transpose(1, 0, 2), device).double()  # (B, V, 4)
    crops = boxes.shape[0]
    # (B, 3H, W) @ (B, W, V * Sw)
    across = _weights(box[..., 0], box[..., 2], wide, width)
    rows = _resample(padded.flatten(1, 2), [half.flatten(1, 2).transpose(1, 2) for half in across])
    rows = rows.view(number, 3, height, crops, wide).permute(0, 3, 2, 1, 4).flatten(3)  # (B, V, H, 3 Sw)
    down = _weights(box[..., 1], box[..., 3], tall, height)
    cut = _resample(rows, list(down), left=True)  # (B, V, Sh, 3 Sw)
    return cut.view(number, crops, tall, 3, wide).permute(1, 0, 3, 2, 4).contiguous()


def _resample(pixels: Tensor, halves: list[Tensor], *, left: bool = False) -> Tensor:
    """Pixels times both halves of the integer weights, rounded as Pillow rounds; exact in float32 and in TF32."""
    upper, lower = (half @ pixels if left else pixels @ half for half in halves)
    carried = upper + (lower / 2**_HALF).floor()
    rounded: Tensor = ((carried + 2 ** (_BITS - _HALF - 1)) / 2 ** (_BITS - _HALF)).floor()
    return rounded


def _weights(start: Tensor, end: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Pillow's antialiased bilinear weights (B, V, S, length) from `start` to `end`, (B, V) each, in two halves.

    A weight is an integer of 22 bits; the halves are its upper and its lower 11 bits. Sums of 8-bit pixels times either
    half stay below 2 ** 24 up to 32 taps, that is up to a reduction by 15.
    """
    extent = (end - start)[..., None, None]
    scale = extent / size
    support = scale.clamp(min=1)
    centre = (torch.arange(size, device=start.device, dtype=torch.float64)[:, None] + 0.5) * scale  # (B, V, S, 1)
    first = (centre - support + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).floor(), extent)
    taps = int(2 * float(np.ceil(max(1.0, length / size)))) + 2
    place = first + torch.arange(taps, device=start.device, dtype=torch.float64)  # (B, V, S, taps)
    weight = (1 - ((place - centre + 0.5) / support).abs()).clamp(min=0) * (place < last)
    weight = (weight / weight.sum(dim=-1, keepdim=True) * 2**_BITS + 0.5).floor()
    column = (place + start[..., None, None]).clamp(max=length - 1).long()
    upper = (weight / 2**_HALF).floor()
    halves = torch.zeros(2, *column.shape[:-1], length, device=start.device)
    halves[0].scatter_add_(-1, column, upper.float())
    halves[1].scatter_add_(-1, column, (weight - upper * 2**_HALF).float())
    return halves[0], halves[1]


# ---------------------------------------------------------------------------------------- colours, by Pillow's formulas


def luminance(x: Tensor) -> Tensor:
    """Pillow's conversion to "L": (N, 3, Sh, Sw) -> (N, 1, Sh, Sw), rounded; exact, for all sums stay below 2 ** 24."""
    weights = to_device(np.array([19595.0, 38470.0, 7471.0], np.float32), x.device)[:, None, None]
    return (((x * weights).sum(dim=1, keepdim=True) + 32768) / 65536).floor()


def _blend(start: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (start + factor * (x - start)).clamp(0, 255).floor()


def change_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor > 1) or towards black; the factor is (N, 1, 1, 1)."""
    return _blend(torch.zeros_like(x), x, factor)


def change_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor > 1) or towards the mean grey level of the crop."""
    mean = luminance(x).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean + 0.5).floor().float(), x, factor)


def change_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor > 1) or towards grey."""
    return _blend(luminance(x), x, factor)


def shift_hue(x: Tensor, step: Tensor) -> Tensor:
    """Turn the hue by `step` of 256, (N, 1, 1, 1), through Pillow's 8-bit HSV."""
    red, green, blue = x.unbind(dim=1)
    value, least = x.amax(dim=1), x.amin(dim=1)
    span = (value - least).clamp(min=1)
    from_red, from_green, from_blue = ((value - c) / span for c in (red, green, blue))
    # Single and double precision where Pillow has them, since everything is cut to whole numbers afterwards.
    hue = torch.where(
        red == value,
        from_blue - from_green,
        torch.where(
            green == value,
            (2 + from_red.double() - from_blue).float(),
            (4 + from_green.double() - from_red).float(),
        ),
    )
    hue = (((hue.double() / 6 + 1) % 1).float().double() * 255).floor()
    saturation = ((span / value.clamp(min=1)).double() * 255).floor()
    grey = value == least
    hue = (torch.where(grey, torch.zeros_like(hue), hue) + step[:, 0]) % 256
    sector = (hue * 6 / 255).floor()
    part, share = (hue * 6 / 255 - sector).float(), (saturation / 255).float()
    p = _round(value * (1 - share.double()))
    q = _round(value * (1 - (share * part).double()))
    t = _round(value * (1 - share.double() * (1 - part.double())))
    levels = torch.stack([value.double(), q, p, t])
    # Which of value, q, p, t is red, green and blue in each of the six sectors.
    table = to_device(np.array([[0, 1, 2, 2, 3, 0], [3, 0, 0, 1, 2, 2], [2, 2, 3, 0, 0, 1]]), x.device)
    chosen = table[:, (sector % 6).long()]  # (3, N, Sh, Sw)
    turned = levels.gather(0, chosen).transpose(0, 1)
    return torch.where((saturation == 0).unsqueeze(1) | grey.unsqueeze(1), value.unsqueeze(1), turned.float())


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor()  # of what is not negative; halves go up, as C's round


# ---------------------------------------------------------------------------------------------------------------- blur


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Pillow's GaussianBlur: three extended box blurs along each axis, rounded after each; `sigma` is (N, 1, 1, 1).

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    variance = sigma.square() / _PASSES
    whole = (((12 * variance.double() + 1).sqrt().float() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    # Integer weights of 24 bits from a division in single precision, as Pillow has them; float64 sums them exactly.
    inner = (2**_BLUR_BITS / ((whole + part) * 2 + 1)).floor().double()
    edge = ((2**_BLUR_BITS - (2 * whole + 1) * inner) / 2).floor()
    taps = [
        torch.where(whole >= tap, inner, torch.where(whole + 1 == tap, edge, torch.zeros_like(edge)))
        for tap in range(_REACH + 1)
    ]
    x = x.double()
    for _ in range(2):  # along the rows, then along the columns
        for _ in range(_PASSES):
            x = _box_blur(x, taps)
        x = x.transpose(2, 3)
    return x.float()


def _box_blur(x: Tensor, taps: list[Tensor]) -> Tensor:
    """One pass along the last axis; the edge pixels are repeated."""
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (_REACH, _REACH, 0, 0), mode="replicate")
    total = taps[0] * x
    for tap in range(1, _REACH + 1):
        left, right = padded[..., _REACH - tap :][..., :width], padded[..., _REACH + tap :][..., :width]
        total = total + taps[tap] * (left + right)
    return _round(total / 2**_BLUR_BITS)
