"""RandomResizedCrop's box, as in torchvision, as a pure function of its random draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

ATTEMPTS = 10
DRAWS = 4 * ATTEMPTS  # uniform in [0, 1): area, aspect ratio, left and top of each attempt
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))


def crop_box(
    width: int, height: int, scale: tuple[float, float], draws: Sequence[float]
) -> tuple[int, int, int, int]:  # fmt: skip
    """A box (left, top, right, bottom) with an aspect ratio from 3/4 to 4/3; a centre box if no attempt fits.

    Args:
        width: of the image, in pixels.
        height: likewise.
        scale: smallest and largest share of the image's area.
        draws: DRAWS uniform numbers.
    """
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
