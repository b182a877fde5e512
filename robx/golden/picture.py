"""The picture of the golden sample: drawn by arithmetic alone, so no user's image leaks and every run draws the same.

Each part makes one mistake visible: colours that are not grey (swapped channels), a layout without symmetry (flips,
crops, stretching), and texture finer than the model's pixels (a resize without antialiasing).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from robx.records import MAX_SIDE, Preprocessing

_ASPECT = 4 / 3
_OVERSIZE = 2.1  # sides of the picture relative to the resized image; not a whole number, as with real photos


def draw_picture(preprocessing: Preprocessing) -> Image.Image:
    """An RGB picture about twice as large as the model's resized input, wider than high."""
    height, width = preprocessing.shape
    short = round(preprocessing.size * _OVERSIZE)
    wide = short * _ASPECT * min(max(1.0, width / height), 4.0)
    scale = min(1.0, MAX_SIDE / max(short, wide))
    return Image.fromarray(_pixels(round(short * scale), round(wide * scale)))


def _pixels(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3)."""
    rows, columns = np.arange(height, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)[None, :]
    y, x = rows / height + 0 * columns, columns / width + 0 * rows
    pixels = np.stack([60 + 150 * x, 190 - 120 * y, 90 + 110 * x * y], axis=-1)
    # Rings that become finer outwards, to beyond the sampling limit of the model's input.
    distance = (x - 0.72) ** 2 + (y - 0.7) ** 2 * (height / width) ** 2
    rings = 127.5 + 110 * np.cos(distance * np.pi * width * 1.1)
    _paint(pixels, distance < 0.055, np.stack([rings, 0.8 * rings, 40 + 0.6 * rings], axis=-1))
    _paint(pixels, (x - 0.27) ** 2 + ((y - 0.33) * height / width) ** 2 < 0.022, (214, 48, 39))
    _paint(pixels, (abs(x - 0.6) < 0.11) & (abs(y - 0.22) < 0.12), (28, 72, 196))
    _paint(pixels, (y > 0.62) & (y < 0.93) & (abs(x - 0.2) < 0.55 * (y - 0.62)), (246, 205, 52))
    stripes = ((rows + 2 * columns) % 5 < 2)[..., None] * np.array([200.0, 190.0, 30.0]) + 25
    _paint(pixels, (x > 0.36) & (x < 0.5) & (y > 0.42) & (y < 0.95), stripes)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _paint(pixels: np.ndarray, where: np.ndarray, colour: np.ndarray | tuple[int, int, int]) -> None:
    """Replace the pixels at `where` (H, W) by one colour, or by those of an image (H, W, 3); in place."""
    pixels[where] = colour[where] if isinstance(colour, np.ndarray) else np.array(colour, dtype=np.float64)
