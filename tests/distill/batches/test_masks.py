from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robx.distill.batches.masks import block_masks, drop_masks

RATIOS = ((0.0, 0.0), (0.3, 0.2))


@settings(deadline=None, max_examples=60)
@given(
    grid=st.tuples(st.integers(2, 16), st.integers(2, 16)),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 300),
    index=st.integers(0, 2_000_000),
)
def test_masks_are_a_pure_function_and_never_exceed_the_ratio(
    grid: tuple[int, int], seed: int, epoch: int, index: int
) -> None:
    masks = block_masks(grid, RATIOS, seed=seed, epoch=epoch, index=index)
    assert masks.shape == (2, grid[0] * grid[1])
    assert masks.dtype == bool
    assert masks.sum(axis=1).max() <= 0.5 * grid[0] * grid[1]
    np.random.seed(0)  # noqa: NPY002 (the global generator must not matter)
    np.testing.assert_array_equal(masks, block_masks(grid, RATIOS, seed=seed, epoch=epoch, index=index))


def test_seed_epoch_index_and_crop_all_matter() -> None:
    def draw(**places: int) -> np.ndarray:  # type: ignore[type-arg]
        return block_masks((14, 14), [(0.4, 0.1)], **({"seed": 1, "epoch": 2, "index": 3} | places))  # type: ignore[arg-type]

    base = draw()
    assert not np.array_equal(base[0], base[1])
    for change in ({"seed": 2}, {"epoch": 3}, {"index": 4}):
        assert not np.array_equal(base, draw(**change))


def test_half_of_the_crops_are_masked_by_nearly_what_is_asked() -> None:
    shares = np.concatenate([block_masks((14, 14), RATIOS, seed=0, epoch=0, index=i).mean(axis=1) for i in range(600)])
    assert abs((shares > 0).mean() - 0.5) < 0.06
    masked = shares[shares > 0]
    # Uniform in .1 .. .5; a mask stops a little short of its ratio when no further block fits.
    assert masked.min() > 0.05
    assert masked.max() <= 0.5
    assert abs(masked.mean() - 0.3) < 0.03


def test_blocks_are_as_often_wide_as_high() -> None:
    """Aspect ratios that are drawn without the logarithm would make most blocks high."""
    wide = high = 0
    for i in range(400):
        mask = block_masks((14, 14), [(0.1, 0.0)], seed=0, epoch=0, index=i, crops=1).reshape(14, 14)
        if not mask.any():
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        if mask.sum() == h * w:  # a single block
            wide, high = wide + (w > h), high + (h > w)
            assert 0.2 < h / w < 5
    assert wide + high > 60
    assert abs(wide - high) < 3 * math.sqrt(wide + high)


@given(grid=st.tuples(st.integers(1, 14), st.integers(1, 14)), share=st.floats(0, 0.95), index=st.integers(0, 10**6))
def test_dropped_patches_are_equally_many_and_leave_one(grid: tuple[int, int], share: float, index: int) -> None:
    masks = drop_masks(grid, share, seed=0, epoch=0, index=index)
    patches = grid[0] * grid[1]
    kept = (~masks).sum(axis=1)
    assert kept[0] == kept[1] == max(1, math.floor(patches * (1 - share)))


def test_blocks_reach_every_part_of_a_grid_that_is_not_square() -> None:
    """10 x 6 patches, as of 160 x 96 pixels: the rows are those of the image."""
    found = [block_masks((10, 6), [(0.3, 0.0)], seed=0, epoch=0, index=i, crops=1)[0] for i in range(600)]
    masks = np.stack(found).reshape(-1, 10, 6)
    often = masks.mean(axis=0)
    assert often.min() > 0.05 and 0.15 < often.mean() <= 0.3
    for other in (masks[:, 5, 2], masks[:, 4, 3]):  # below and beside a patch, both are masked together with it
        assert other[masks[:, 4, 2]].mean() > 1.4 * often[4, 2]


def test_every_patch_is_dropped_equally_often() -> None:
    often = np.mean([drop_masks((4, 4), 0.25, seed=0, epoch=0, index=i) for i in range(2000)], axis=(0, 1))
    np.testing.assert_allclose(often, 0.25, atol=0.04)


@pytest.mark.parametrize("ratios", [[(0.0, 0.0)], [(0.001, 0.0)]])
def test_nothing_to_mask(ratios: list[tuple[float, float]]) -> None:
    assert not block_masks((14, 14), ratios, seed=0, epoch=0, index=0).any()
