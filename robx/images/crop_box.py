"""RandomResizedCrop's box, as in torchvision, as a pure function of its random draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

ATTEMPTS = 10
DRAWS = 4 * ATTEMPTS  # uniform in [0, 1): area, aspect ratio, left and top of each attempt
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))


def crop_box(
    width: int, height: int, scale: tuple[float, float], draws: Sequence[float], *, aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of 3/4 to 4/3 of `aspect`; a centre box if no attempt fits.

    For a square crop this is torchvision's RandomResizedCrop. Any other crop is distorted as little as a square one:
    the ratio of its box is centred on its own aspect ratio, where torchvision would stretch nearly square boxes. Where
    the largest box of that ratio covers less of the image than a square would, the areas shrink alike, or hardly any
    box would fit.

    Args:
        width: of the image, in pixels.
        height: likewise.
        scale: smallest and largest share of the image's area.
        draws: DRAWS uniform numbers.
        aspect: width / height of the crop that the box becomes.
    """
    area = width * height * min(1.0, _largest_share(width / height, aspect) / _largest_share(width / height, 1.0))
    for share, where, left, top in zip(*[iter(draws)] * 4, strict=True):
        target = area * (scale[0] + share * (scale[1] - scale[0]))
        ratio = aspect * math.exp(_LOG_ASPECT[0] + where * (_LOG_ASPECT[1] - _LOG_ASPECT[0]))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    ratio = min(max(width / height, aspect * 3 / 4), aspect * 4 / 3)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _largest_share(image: float, box: float) -> float:
    """Share of an image of aspect ratio `image` that the largest box of aspect ratio `box` covers."""
    return min(image / box, box / image)
