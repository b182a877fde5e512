"""Which patches of a global crop a ViT student does not see: a pure function of (seed, epoch, index, crop).

iBOT replaces blocks of patches with a learnable token; MSN drops single patches.

P = H W patches, row by row
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_ATTEMPTS = 10  # to place one block, before the mask is accepted as it is
# Separate these random streams from those of the crops at the same (seed, epoch, index).
_BLOCKS, _DROPS = 0x69424F54, 0x4D534E


def block_masks(
    grid: tuple[int, int], ratios: Sequence[tuple[float, float]], *, seed: int, epoch: int, index: int, crops: int = 2
) -> Mask:
    """iBOT's block masks of one image's global crops (iBOT, arXiv 2111.07832; BEiT, 2106.08254, algorithm 1).

    Args:
        grid: patches (H, W) of a global crop.
        ratios: (centre, half width) of the prediction ratio; each crop draws one pair, then uniformly within it.
        seed: of the run.
        epoch: 0-based.
        index: of the image in the source.
        crops: number of global crops.

    Returns:
        (crops, P), True where a patch is masked; never more than the drawn ratio.
    """
    return np.stack(
        [_block_mask(grid, ratios, np.random.default_rng([seed, epoch, index, crop, _BLOCKS])) for crop in range(crops)]
    )


def drop_masks(grid: tuple[int, int], share: float, *, seed: int, epoch: int, index: int, crops: int = 2) -> Mask:
    """MSN's dropped patches of one image's global crops (MSN, arXiv 2204.07141, section 3, "random mask").

    Returns:
        (crops, P), True where a patch is dropped; the same number, P - floor(P (1 - share)), in every crop.
    """
    patches = grid[0] * grid[1]
    masks = np.zeros((crops, patches), dtype=bool)
    for crop in range(crops):
        order = np.random.default_rng([seed, epoch, index, crop, _DROPS]).permutation(patches)
        masks[crop, order[kept_patches(patches, share) :]] = True
    return masks


def kept_patches(patches: int, share: float) -> int:
    """How many of `patches` remain when the fraction `share` is dropped, at least 1."""
    return max(1, int(patches * (1 - share)))


def _block_mask(grid: tuple[int, int], ratios: Sequence[tuple[float, float]], rng: np.random.Generator) -> Mask:
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    centre, spread = ratios[int(rng.integers(len(ratios)))]
    left = int(rng.uniform(centre - spread, centre + spread) * height * width)
    smallest = max(1, (min(height, width) // 3) ** 2)
    while left > 0:
        added = _add_block(mask, left, smallest, rng)
        if not added:
            break
        left -= added
    return mask.reshape(-1)


def _add_block(mask: Mask, left: int, smallest: int, rng: np.random.Generator) -> int:
    """Mask one more block of at most `left` new patches; returns how many were added, 0 if no attempt fitted."""
    height, width = mask.shape
    for _ in range(_ATTEMPTS):
        area = smallest + (left - smallest) * rng.random()  # `left` may be below `smallest`
        aspect = math.exp(rng.uniform(*_LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, start = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        block = mask[top : top + h, start : start + w]
        new = h * w - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            return new
    return 0
