"""Linear evaluation: the accuracy of a linear head on the frozen trunk.

`linear_streamed` is VISSL's protocol: every epoch sees fresh random resized crops, so the trunk runs on each of them;
it needs a Student in PyTorch. `linear_cached` trains the same heads on features extracted once, without augmentation:
minutes instead of days, possible for a Bundle, and a different figure, which records call "linear-cached".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robx.errors import InputError
from robx.eval.datasets.features import Features
from robx.eval.protocols.trained_heads import HeadRecipe, Heads, head_values, headline
from robx.eval.protocols.trunk_outputs import TrunkSession
from robx.images.crop_box import DRAWS, crop_box
from robx.images.decode import normalise_pixels
from robx.images.reading import read_batches
from robx.images.sources import ImageSource, labels_of
from robx.progress import Progress
from robx.records import Preprocessing, Value

VISSL = HeadRecipe(epochs=28, milestones=(8, 16, 24))
RATES = (0.01, 0.001, 0.1)
# A few hundred images give too few steps in 28 epochs; features are cheap, so the cached variant trains longer.
LEAST_STEPS = 1000
_EMBED_ROWS = 65_536
_SCALE = (0.08, 1.0)  # of the image's area, in a training view


def linear_cached(
    bank: Features,
    test: Features,
    *,
    classes: int,
    kinds: Mapping[str, slice] | None = None,
    recipe: HeadRecipe = VISSL,
    rates: Sequence[float] = RATES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Value]:
    """Train heads on the bank's features (N, D), evaluate on the test's (M, D); "top1" is at the recipe's own rate.

    Args:
        bank: training features and labels; unlabelled rows are left out.
        test: test features and labels.
        classes: C.
        kinds: feature kinds within a row, name -> columns; None is the whole row.
        recipe: optimiser and schedule; extended to at least LEAST_STEPS steps.
        rates: learning rates trained in parallel; the recipe's own is always included.
        seed: of the order and the initial weights.
        progress: called with (steps done, steps, note).

    Raises:
        InputError: no labelled images, or features that are not finite.
    """
    test_rows, test_labels = _labelled_tensors(test)
    kinds = kinds or {"embedding": slice(0, bank.features.shape[1])}
    heads, best = train_cached(
        bank, classes=classes, kinds=kinds, recipe=recipe, rates=rates, seed=seed, progress=progress
    )
    return _judge(heads, test_rows, test_labels.numpy(), kinds, classes=classes, headline=best)


def train_cached(
    bank: Features,
    *,
    classes: int,
    kinds: Mapping[str, slice],
    recipe: HeadRecipe = VISSL,
    rates: Sequence[float] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Heads, str]:
    """The heads of `linear_cached`, trained, and the name of the headline's; same arguments and errors."""
    rows, labels = _labelled_tensors(bank)
    _require_two(len(rows))
    widths = {name: rows[:1, columns].shape[1] for name, columns in kinds.items()}
    batch = min(recipe.batch, len(rows))
    an_epoch = max(1, len(rows) // batch)
    epochs = max(recipe.epochs, math.ceil(LEAST_STEPS / an_epoch))
    steps = epochs * an_epoch
    recipe = replace(recipe, batch=batch)
    heads = Heads(widths, classes=classes, recipe=recipe, rates=_rates(recipe, rates), steps=steps, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=generator)
        for step in range(an_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            features = rows[chosen]
            heads.fit_batch({name: features[:, columns] for name, columns in kinds.items()}, labels[chosen])
        if progress:
            progress((epoch + 1) * an_epoch, steps, "training heads")
    return heads, headline(widths, recipe)


def _require_two(images: int) -> None:
    """Refuse a single image: BatchNorm needs a variance."""
    if images < 2:
        raise InputError("a linear head needs two labelled images or more, got 1: give more")


def linear_streamed(
    session: TrunkSession,
    source: ImageSource,
    test: Features,
    *,
    classes: int,
    labels: np.ndarray | None = None,
    recipe: HeadRecipe = VISSL,
    rates: Sequence[float] = RATES,
    crop: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Value]:
    """VISSL's linear evaluation of a Student: frozen trunk, fresh random resized crops and flips every epoch.

    Args:
        session: the trunk; its `kinds` are the feature kinds.
        source: the training images.
        test: the same session's features of the test images.
        classes: C.
        labels: int64 (N,) instead of the source's own; negative ones are left out.
        recipe: optimiser and schedule.
        rates: learning rates trained in parallel; the recipe's own is always included.
        crop: False resizes the whole image to the square instead (Clevr/Dist: a crop would change the answer).
        seed: of the crops, the order and the initial weights.
        progress: called with (images done, images, note).

    Raises:
        InputError: no labelled images, or none that can be read.
    """
    labels = labels_of(source) if labels is None else labels
    usable = np.flatnonzero(labels >= 0)
    if not len(usable):
        raise InputError(f"{source.name} has no labelled images: a linear head needs them")
    _require_two(len(usable))
    test_rows, test_labels = _labelled_tensors(test)
    widths = {name: columns.stop - columns.start for name, columns in session.kinds.items()}
    batch = min(recipe.batch, len(usable))
    steps = recipe.epochs * math.ceil(len(usable) / batch)
    recipe = replace(recipe, batch=batch)
    heads = Heads(
        widths, classes=classes, recipe=recipe, rates=_rates(recipe, rates), steps=steps, seed=seed,
        device=session.device,
    )  # fmt: skip
    for epoch in range(recipe.epochs):
        order = usable[np.random.default_rng((seed, epoch)).permutation(len(usable))]
        read = _reader(
            source, session.bundle.preprocessing, seed=(seed, epoch), crop=crop, raw=session.takes_pixels
        )  # fmt: skip
        done = 0
        for indices, pixels in read_batches(order.tolist(), read, batch_size=batch):
            done += len(indices)
            if len(indices) < 2:  # BatchNorm needs a variance
                continue
            rows = session.features(torch.from_numpy(pixels)).clone()
            wanted = torch.from_numpy(labels[indices]).to(session.device)
            heads.fit_batch({name: rows[:, columns] for name, columns in session.kinds.items()}, wanted)
            if progress:
                progress(epoch * len(usable) + done, recipe.epochs * len(usable), "training heads on fresh crops")
        if not done:
            raise InputError(f"none of the labelled images of {source.name} can be read: give other data")
    return _judge(
        heads, test_rows.to(session.device), test_labels.numpy(), session.kinds, classes=classes,
        headline=headline(widths, recipe),
    )  # fmt: skip


def random_resized_crop(
    image: Image.Image, preprocessing: Preprocessing, rng: np.random.Generator, *, crop: bool = True
) -> np.ndarray:
    """A training view, uint8 (H, W, 3): 8 to 100 % of the area, 3/4 to 4/3 of W / H, flipped half the time."""
    (width, height), (rows, columns) = image.size, preprocessing.shape
    draws = rng.random(DRAWS).tolist() if crop else []
    box = crop_box(width, height, _SCALE, draws, aspect=columns / rows) if crop else (0, 0, width, height)
    view = image.resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(view)


def _reader(
    source: ImageSource, preprocessing: Preprocessing, *, seed: tuple[int, int], crop: bool, raw: bool
) -> Callable[[int], np.ndarray]:
    """Training views as pixels if `raw`, else normalised."""

    def read(index: int) -> np.ndarray:
        # A crop depends on (seed, epoch, image) alone, whichever thread makes it.
        rng = np.random.default_rng((*seed, index))
        view = random_resized_crop(source.read(index), preprocessing, rng, crop=crop)
        return view if raw else normalise_pixels(view, preprocessing)

    return read


def _judge(
    heads: Heads, rows: Tensor, labels: np.ndarray, kinds: Mapping[str, slice], *, classes: int, headline: str
) -> dict[str, Value]:
    pieces = [
        heads.top({name: piece[:, columns] for name, columns in kinds.items()})
        for piece in torch.split(rows, _EMBED_ROWS)
    ]
    tops = {name: np.concatenate([piece[name] for piece in pieces]) for name in heads.names}
    return head_values(tops, labels, classes=classes, headline=headline)


def _labelled_tensors(found: Features) -> tuple[Tensor, Tensor]:
    keep = found.labels >= 0
    if not keep.any():
        raise InputError("no labelled images: give data with classes (one folder per class)")
    features = found.features if keep.all() else found.features[keep]
    if not np.isfinite(features).all():
        raise InputError("the features contain NaN or infinity: the model is damaged; train or export it again")
    return torch.from_numpy(features), torch.from_numpy(found.labels[keep])


def _rates(recipe: HeadRecipe, rates: Sequence[float]) -> tuple[float, ...]:
    return tuple(dict.fromkeys((recipe.lr, *rates)))
