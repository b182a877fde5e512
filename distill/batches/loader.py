"""Batches of crops in an order that is a pure function of (seed, epoch), for any number of processes and workers.

One DataLoader serves the whole run from any step on: its workers live across epochs and start where the run resumes. An
image that cannot be decoded is replaced by the next one that can, counted and reported; past a budget the run fails.

B batch of this process   Gh, Gw height and width of a global crop, Sh, Sw of a local one   L local crops
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from robx.distill.batches.crops import Crops, Planned, multi_crop, needed_side, normalise, plan_image
from robx.distill.batches.device_crops import device_crops
from robx.distill.batches.masks import block_masks, drop_masks
from robx.distill.batches.views import Views
from robx.distill.recipes import Recipe
from robx.errors import CorruptImage, InputError
from robx.image_size import Shape
from robx.images.arrays import ArraySource
from robx.images.protocol import ImageSource

Place = tuple[int, int]  # (epoch, index)
BATCH_LOST = 92  # exit status of a worker that could not hand over its batch


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits `count` images."""
    generator = np.random.Philox(
        key=np.array([seed, 1], dtype=np.uint64), counter=np.array([0, 0, 0, epoch], dtype=np.uint64)
    )
    return np.random.Generator(generator).permutation(count)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full batches per epoch; an incomplete last batch is dropped.

    Raises:
        InputError: fewer images than one batch.
    """
    if count < batch_size:
        remedy = f"give --batch-size {max(2, count // 2)}" if count > 1 else "give more images"
        found = "1 image is" if count == 1 else f"{count} images are"
        raise InputError(f"{found} fewer than one batch of {batch_size}: {remedy}")
    return count // batch_size


def micro_batch(recipe: Recipe, *, processes: int) -> int:
    """Images per micro-batch of one process.

    Raises:
        InputError: the batch size is not divisible by processes and micro-batches.
    """
    parts = processes * recipe.accumulate
    if recipe.batch_size % parts:
        raise InputError(
            f"batch size {recipe.batch_size} is not divisible by {processes} processes x {recipe.accumulate} "
            f"micro-batches: give --batch-size {max(1, round(recipe.batch_size / parts)) * parts}"
        )
    return recipe.batch_size // parts


@dataclass(frozen=True)
class Share:
    """This process's part of every global batch."""

    rank: int = 0
    world: int = 1


@dataclass
class Skipped:
    """Images that could not be decoded, and how many of them are allowed."""

    images: int  # in the source
    budget: float  # fraction of them
    found: dict[int, str] = field(default_factory=dict)  # index -> why

    def add(self, found: dict[int, str]) -> list[str]:
        """Count `found`; returns the reasons that are new.

        Raises:
            InputError: more than the budget; the message lists the first few.
        """
        new = [reason for index, reason in found.items() if index not in self.found]
        self.found.update(found)
        if new and len(self.found) > self.budget * self.images:
            shown, more = list(self.found.values())[:3], len(self.found) - 3
            first = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
            raise InputError(
                f"{len(self.found)} of {self.images} images cannot be decoded, more than --corrupt-budget "
                f"{self.budget:g} allows; corrupt.txt in the run's folder lists them: {first}"
            )
        return new


def _reason(key: str, error: CorruptImage) -> str:
    """Why an image cannot be decoded, with its name once: the errors of a folder's images contain its path already."""
    return str(error) if key in str(error) else f"{key}: {error}"


@dataclass
class CutCrops:
    """Crops that a worker made with Pillow."""

    globals: Tensor  # (M, B, Gh, Gw, 3) uint8, M global crops
    locals: Tensor  # (L, B, Sh, Sw, 3) uint8

    def pin_memory(self) -> CutCrops:
        """The same in page-locked memory."""
        return CutCrops(self.globals.pin_memory(), self.locals.pin_memory())

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalised global and local crops on the device."""
        return normalise(self.globals, device), normalise(self.locals, device)


@dataclass
class DecodedImages:
    """Decoded images and the plans of their crops, for `device_crops`."""

    pixels: Tensor  # (sum of H * W * 3,) uint8, image after image
    shapes: list[tuple[int, int]]  # (H, W) of each
    plans: NDArray[np.void]  # PLAN records (M + L, B)
    globals: int  # M, the first of the plans
    crop_shapes: tuple[Shape, Shape]  # of the global and the local crops

    def pin_memory(self) -> DecodedImages:
        """The same in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalised global and local crops, made on the device."""
        parts = torch.split(self.pixels.to(device, non_blocking=True), [h * w * 3 for h, w in self.shapes])
        images = [part.view(h, w, 3) for part, (h, w) in zip(parts, self.shapes, strict=True)]
        plans = self.plans[: self.globals], self.plans[self.globals :]
        large, small = device_crops(images, list(zip(plans, self.crop_shapes, strict=True)))
        return normalise(large.permute(0, 1, 3, 4, 2), device), normalise(small.permute(0, 1, 3, 4, 2), device)


@dataclass
class Batch:
    """What a worker returns: one process's part of one micro-batch."""

    crops: CutCrops | DecodedImages
    index: Tensor  # (B,) int64, of the images that were read
    epoch: int
    masks: Tensor | None  # (M, B, P) bool
    skipped: dict[int, str]
    masked: Tensor | None = None  # (M,) int64, places of the masked patches; counted only for a GPU

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, for asynchronous copies to a GPU."""
        pinned = replace(self, crops=self.crops.pin_memory())
        if self.masks is not None:
            pinned.masks = self.masks.pin_memory()
            pinned.masked = self.masks.flatten().nonzero()[:, 0].pin_memory()
        return pinned

    def views(self, device: torch.device) -> Views:
        """Normalised crops on the device."""
        large, small = self.crops.to(device)
        return Views(
            globals=large,
            locals=small,
            index=self.index,
            epoch=self.epoch,
            masks=None if self.masks is None else self.masks.to(device, non_blocking=True),
            masked=None if self.masked is None else self.masked.to(device, non_blocking=True),
        )


def decoded_side(recipe: Recipe) -> int | None:
    """Pixels that the shorter side of a decoded JPEG needs, if the recipe allows a reduced size; None: full size."""
    return needed_side(recipe) if recipe.decode == "scaled" else None


def read_crops(source: ImageSource, recipe: Recipe, *, epoch: int, index: int) -> Crops | Planned:
    """One image, decoded as the recipe says, and its crops or, if the device makes them, their plans.

    Raises:
        CorruptImage: it cannot be decoded.
    """
    at_least = decoded_side(recipe)
    if recipe.augment == "device":
        return plan_image(source.read_pixels(index, at_least=at_least), recipe, epoch=epoch, index=index)
    return multi_crop(source.read(index, at_least=at_least), recipe, epoch=epoch, index=index)


_BLANK = ArraySource("blank", np.zeros((1, 1, 1, 3), dtype=np.uint8), None, None)


class CropDataset(Dataset[tuple[Any, ...]]):
    """The crops of one place, (epoch, index)."""

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        *,
        mask_grid: tuple[int, int] | None = None,
        corrupt_budget: float = 0.001,
    ) -> None:
        """Crops of `source`; `mask_grid` is the patch grid of a global crop if iBOT or MSN masks it."""
        self.source, self.recipe, self.mask_grid = source, recipe, mask_grid
        self._most_skipped = int(corrupt_budget * len(source)) + 1

    def __getitem__(self, place: Place) -> tuple[Any, ...]:
        """(crops, index, epoch, masks, skipped); an unreadable image is replaced by the next readable one."""
        epoch, index = place
        skipped: dict[int, str] = {}
        for offset in range(self._most_skipped + 1):
            at = (index + offset) % len(self.source)
            try:
                crops = read_crops(self.source, self.recipe, epoch=epoch, index=at)
            except CorruptImage as error:
                skipped[at] = _reason(self.source.key(at), error)
                continue
            return crops, at, epoch, self._masks(epoch, at), skipped
        # The budget is exceeded: counting `skipped` ends the run before this blank image is used.
        blank = read_crops(_BLANK, self.recipe, epoch=epoch, index=0)
        return blank, index, epoch, self._masks(epoch, index), skipped

    def _masks(self, epoch: int, index: int) -> Any:
        if self.mask_grid is None:
            return None
        recipe = self.recipe
        where = {"seed": recipe.seed, "epoch": epoch, "index": index, "crops": recipe.global_crops}
        if recipe.objective == "ibot":
            return block_masks(self.mask_grid, recipe.mask_ratios, **where)
        return drop_masks(self.mask_grid, recipe.patch_drop, **where)


class PlaceSampler(Sampler[list[Place]]):
    """The micro-batches of one process, as lists of (epoch of the crops, index)."""

    def __init__(self, count: int, recipe: Recipe, *, share: Share, start: int, end: int) -> None:
        """Batches of optimiser steps `start` .. `end` - 1 over `count` images."""
        self.count, self.recipe, self.share, self.start, self.end = count, recipe, share, start, end

    def __iter__(self) -> Iterator[list[Place]]:
        """One list per micro-batch; global batches do not depend on the number of processes."""
        recipe, share = self.recipe, self.share
        per_epoch = steps_per_epoch(self.count, recipe.batch_size)
        micro = micro_batch(recipe, processes=share.world)
        mine = micro * recipe.accumulate
        known, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.end):
            epoch, batch = divmod(step, per_epoch)
            if epoch != known:
                known, order = epoch, epoch_order(self.count, seed=recipe.seed, epoch=epoch)
            # The order of the images is always that of the epoch itself; only its crops are repeated.
            crops = epoch % recipe.target_epochs if recipe.target_epochs else epoch
            first = batch * recipe.batch_size + share.rank * mine
            for at in range(first, first + mine, micro):
                yield [(crops, int(index)) for index in order[at : at + micro]]

    def __len__(self) -> int:
        """Remaining micro-batches."""
        return (self.end - self.start) * self.recipe.accumulate


def build_loader(
    source: ImageSource,
    recipe: Recipe,
    *,
    start: int,
    end: int,
    share: Share | None = None,
    workers: int = 0,
    mask_grid: tuple[int, int] | None = None,
    corrupt_budget: float = 0.001,
    pin_memory: bool = False,
    prefetch: int = 4,
    timeout: float = 0,
) -> DataLoader[Any]:
    """Every micro-batch of this process from step `start` to step `end`.

    With workers, `prefetch` is in batches per worker, and waiting for one longer than `timeout` seconds (0: no limit)
    raises RuntimeError; the next call waits on.

    Raises:
        InputError: the batch size is not divisible by processes and micro-batches, or exceeds the number of images.
    """
    share = share or Share()
    steps_per_epoch(len(source), recipe.batch_size)
    micro_batch(recipe, processes=share.world)
    return DataLoader(
        CropDataset(source, recipe, mask_grid=mask_grid, corrupt_budget=corrupt_budget),
        batch_sampler=PlaceSampler(len(source), recipe, share=share, start=start, end=end),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=prefetch if workers else None,
        timeout=timeout if workers else 0,
        pin_memory=pin_memory,
    )


def collate(samples: Sequence[tuple[Any, ...]]) -> Batch:
    """Stack crops view by view, or pack decoded images; the only copy between a sample and the device."""
    crops, index, epochs, masks, skipped = zip(*samples, strict=True)
    return Batch(
        crops=_pack(crops) if isinstance(crops[0], Planned) else _stack(crops),
        index=torch.tensor(index, dtype=torch.int64),
        epoch=epochs[0],
        masks=None if masks[0] is None else torch.as_tensor(np.stack(masks, axis=1)),
        skipped={at: reason for found in skipped for at, reason in found.items()},
    )


def _stack(crops: Sequence[Crops]) -> CutCrops:
    large, small = ([getattr(one, name) for one in crops] for name in ("globals", "locals"))
    return CutCrops(torch.from_numpy(np.stack(large, axis=1)), torch.from_numpy(np.stack(small, axis=1)))


def _pack(images: Sequence[Planned]) -> DecodedImages:
    return DecodedImages(
        pixels=torch.from_numpy(np.concatenate([image.pixels.reshape(-1) for image in images])),
        shapes=[image.pixels.shape[:2] for image in images],
        plans=np.stack([image.plans for image in images], axis=1),
        globals=images[0].globals,
        crop_shapes=images[0].shapes,
    )


def _start_worker(_: int) -> None:
    # The main process handles signals; workers end when it closes their queues.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def leave(error: Exception, batch: object) -> None:
        os._exit(BATCH_LOST)

    # Without shared memory or open files for a batch, the queue would print a traceback and drop the batch, and the
    # main process would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(leave)  # type: ignore[attr-defined]
