from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robx.distill.batches.crops import needed_side, plan_image
from robx.distill.batches.loader import (
    Batch,
    PlaceSampler,
    Share,
    Skipped,
    build_loader,
    decoded_side,
    epoch_order,
    steps_per_epoch,
)
from robx.distill.recipes import Recipe, override, preset
from robx.errors import InputError
from robx.images.decode import IMAGENET_STD
from robx.images.sources import ImageSource, open_source

RECIPE = override(
    preset("msn", "vit"),
    {"crop_size": 32, "local_crop_size": 16, "local_crops": 1, "batch_size": 8, "epochs": 2, "patch_drop": 0.0},
)


def load(
    source: ImageSource, recipe: Recipe = RECIPE, *, start: int = 0, end: int = 6, **options: object
) -> list[Batch]:
    return list(build_loader(source, recipe, start=start, end=end, **options))  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.crops.globals, b.crops.globals)
        and torch.equal(a.crops.locals, b.crops.locals)
        and torch.equal(a.index, b.index)
    )


def test_workers_do_not_matter_and_any_step_can_be_the_first(scenes: Path) -> None:
    source = open_source(scenes)
    alone = load(source, end=12)
    assert all(same(a, b) for a, b in zip(alone, load(source, end=12, workers=2), strict=True))
    assert all(same(a, b) for a, b in zip(alone[7:], load(source, start=7, end=12), strict=True))
    assert [batch.epoch for batch in alone] == [0] * 8 + [1] * 4


def test_crops_made_on_the_device_are_those_of_the_workers(scenes: Path) -> None:
    source, device = open_source(scenes), torch.device("cpu")
    on_device = override(RECIPE, {"augment": "device"})
    made = [batch.views(device) for batch in load(source, on_device)]
    again = [batch.views(device) for batch in load(source, on_device, start=2, workers=2)]
    cut = [batch.views(device) for batch in load(source)]
    level = 1 / (255 * min(IMAGENET_STD))  # one of 255 levels, normalised
    for ours, theirs in zip(made, cut, strict=True):
        assert torch.equal(ours.index, theirs.index)
        for a, b in ((ours.globals, theirs.globals), (ours.locals, theirs.locals)):
            assert a.shape == b.shape and a.stride() == b.stride()
            assert (a - b).abs().mean() < 0.05 * level and (a - b).abs().mean(dim=(2, 3, 4)).max() < 1.5 * level
    assert all(torch.equal(a.globals, b.globals) for a, b in zip(made[2:], again, strict=True))
    assert all(torch.equal(a.locals, b.locals) for a, b in zip(made[2:], again, strict=True))


def test_no_local_crops_on_the_device(scenes: Path) -> None:
    recipe = override(RECIPE, {"augment": "device", "local_crops": 0})
    (batch,) = load(open_source(scenes), recipe, end=1)
    views = batch.views(torch.device("cpu"))
    assert views.globals.shape == (2, 8, 3, 32, 32) and views.locals.shape == (0, 8, 3, 16, 16)


def test_large_images_are_reduced_before_they_are_sent() -> None:
    recipe = override(RECIPE, {"global_scale": [0.25, 1.0], "local_scale": [0.25, 1.0]})  # 64 pixels are needed
    for size, expected in (((127, 300), (127, 300)), ((128, 300), (64, 150)), ((600, 511), (150, 128))):
        planned = plan_image(np.asarray(Image.new("RGB", size, (9, 80, 200))), recipe, epoch=0, index=0)
        assert planned.pixels.shape == (expected[1], expected[0], 3) and (planned.pixels == (9, 80, 200)).all()
        assert (planned.plans["box"][:, 2] <= expected[0]).all() and (planned.plans["box"][:, 3] <= expected[1]).all()


def test_a_scaled_decode_leaves_what_the_crops_need(tmp_path: Path) -> None:
    """Crops of 32 and 16 pixels of a quarter of the image need 64: a JPEG of twice that is decoded at half its size."""
    recipe = override(RECIPE, {"global_scale": [0.25, 1.0], "local_scale": [0.25, 1.0]})
    scaled = override(recipe, {"decode": "scaled"})
    assert needed_side(recipe) == 64
    rng = np.random.default_rng(0)
    sizes = {"a.jpg": (127, 300), "b.jpg": (128, 300), "c.jpg": (600, 511), "d.jpg": (2000, 640), "e.png": (600, 511)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
    source = open_source(tmp_path)
    assert [source.read(at, at_least=decoded_side(recipe)).size for at in range(5)] == list(sizes.values())
    expected = [(127, 300), (64, 150), (150, 128), (250, 80), (600, 511)]
    assert [source.read(at, at_least=decoded_side(scaled)).size for at in range(5)] == expected
    (full,), (half,) = (load(source, override(one, {"batch_size": 5}), end=1) for one in (recipe, scaled))
    (again,) = load(source, override(scaled, {"batch_size": 5}), end=1)
    small = [at for at, index in enumerate(full.index.tolist()) if index in (0, 4)]
    assert torch.equal(full.crops.globals[:, small], half.crops.globals[:, small])
    assert not torch.equal(full.crops.globals, half.crops.globals)
    assert torch.equal(again.crops.globals, half.crops.globals)


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(scenes: Path) -> None:
    epoch = [int(i) for batch in load(open_source(scenes), end=8) for i in batch.index]
    assert sorted(epoch) == list(range(64))
    assert not np.array_equal(epoch_order(64, seed=0, epoch=0), epoch_order(64, seed=0, epoch=1))
    assert not np.array_equal(epoch_order(64, seed=0, epoch=0), epoch_order(64, seed=1, epoch=0))


@given(
    count=st.integers(16, 80),
    world=st.sampled_from([1, 2, 4]),
    accumulate=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_a_global_batch_is_the_same_for_any_processes_and_micro_batches(
    count: int, world: int, accumulate: int, start: int
) -> None:
    recipe = override(RECIPE, {"batch_size": 16, "accumulate": accumulate})
    whole = list(PlaceSampler(count, override(RECIPE, {"batch_size": 16}), share=Share(), start=start, end=start + 3))
    parts = [
        list(PlaceSampler(count, recipe, share=Share(rank, world), start=start, end=start + 3)) for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        found = [
            place for part in parts for micro in part[step * accumulate : (step + 1) * accumulate] for place in micro
        ]
        assert Counter(found) == Counter(batch) and len(set(batch)) == 16
    assert all(len(part) == 3 * accumulate for part in parts)


def spoil(folder: Path, number: int) -> set[str]:
    paths = sorted(folder.rglob("*.png"))[::5][:number]
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])
    return {str(path) for path in paths}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(40):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
        (tmp_path / f"{index:02d}.png").write_bytes(buffer.getvalue())
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_replaced_and_named(pictures: Path, workers: int) -> None:
    bad = spoil(pictures, 3)
    batches = load(open_source(pictures), end=5, corrupt_budget=0.1, workers=workers)
    assert all(len(batch.index) == 8 and batch.crops.globals.shape[1] == 8 for batch in batches)
    skipped = Skipped(images=40, budget=0.1)
    said = [reason for batch in batches for reason in skipped.add(batch.skipped)]
    assert len(said) == 3 and all(any(path in reason for reason in said) for path in bad)
    assert not skipped.found.keys() & {int(i) for batch in batches for i in batch.index}


def test_past_the_budget_the_run_fails_and_says_how_many(pictures: Path) -> None:
    spoil(pictures, 5)
    skipped = Skipped(images=40, budget=0.1)
    with pytest.raises(InputError, match=r"5 of 40 images cannot be decoded, more than --corrupt-budget 0.1"):
        for batch in load(open_source(pictures), end=5, corrupt_budget=0.1):
            skipped.add(batch.skipped)


def test_the_first_few_corrupt_images_are_named_once_and_the_others_counted(pictures: Path) -> None:
    bad = spoil(pictures, 4)
    found = {index: why for batch in load(open_source(pictures), end=5) for index, why in batch.skipped.items()}
    assert len(found) == 4
    with pytest.raises(InputError, match=r"corrupt\.txt in the run's folder lists them: .*; and 1 more$") as caught:
        Skipped(images=40, budget=0.001).add(found)
    assert sum(str(caught.value).count(name) for name in map(str, bad)) == 3


def test_a_folder_of_nothing_but_rubbish_ends_soon(pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be decoded"):
        Skipped(images=40, budget=0.001).add(load(open_source(pictures), end=1)[0].skipped)


def test_masks_are_the_samples_own(scenes: Path) -> None:
    recipe = override(preset("ibot", "vit"), {"crop_size": 32, "local_crops": 0, "batch_size": 8})
    first, second = (load(open_source(scenes), recipe, end=2, mask_grid=(4, 4), workers=w) for w in (0, 1))
    assert first[0].masks is not None and second[0].masks is not None
    assert first[0].masks.shape == (2, 8, 16) and first[0].masks.dtype == torch.bool
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]
    dropped = load(open_source(scenes), override(RECIPE, {"patch_drop": 0.5}), end=1, mask_grid=(4, 4))[0].masks
    assert dropped is not None and (dropped.sum(dim=-1) == 8).all()
    tall = load(open_source(scenes), override(recipe, {"crop_size": "64x32"}), end=1, mask_grid=(4, 2))[0]
    assert tall.masks is not None and tall.masks.shape == (2, 8, 8)


@pytest.mark.parametrize("augment", ["pillow", "device"])
def test_batches_have_the_crops_own_shapes(scenes: Path, augment: str) -> None:
    recipe = override(RECIPE, {"crop_size": "48x32", "local_crop_size": "16x24", "augment": augment})
    views = load(open_source(scenes), recipe, end=1)[0].views(torch.device("cpu"))
    assert views.globals.shape == (2, 8, 3, 48, 32) and views.locals.shape == (1, 8, 3, 16, 24)


def test_what_does_not_divide_or_fill_a_batch_is_refused(scenes: Path) -> None:
    with pytest.raises(InputError, match="64 images are fewer than one batch of 65"):
        steps_per_epoch(64, 65)
    with pytest.raises(
        InputError, match="batch size 8 is not divisible by 3 processes x 1 micro-batches: give --batch-size 9"
    ):
        load(open_source(scenes), share=Share(0, 3))


def test_target_epochs_replay_the_crops_in_another_order() -> None:
    recipe = override(preset("dino", "vit"), {"batch_size": 4, "target_epochs": 2})
    places = [place for batch in PlaceSampler(8, recipe, share=Share(), start=0, end=10) for place in batch]
    epochs = [places[i : i + 8] for i in range(0, 40, 8)]
    assert [{epoch for epoch, _ in of_epoch} for of_epoch in epochs] == [{0}, {1}, {0}, {1}, {0}]
    assert all(sorted(index for _, index in of_epoch) == list(range(8)) for of_epoch in epochs)
    assert epochs[0] != epochs[2]
