"""The demo's images with a larger test set: 3,000 images can show a drop of 1 point, 867 hardly one of 3."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robx.images.shards import write_shard
from robx.images.sources import LICENCE_FILE, ImageSource, labels_of, open_source
from robx.store.files import read_json, write_json, write_text
from robx.store.folders import new_folder


def hold_out(data: Path, folder: Path, *, labelled: int, unlabelled: int = 0) -> Path:
    """Write shards of `data` into `folder` in which that many training images are test images; reused.

    Unlabelled images count for the cosines, which need no labels, and not for the drops in accuracy.

    Raises:
        SystemExit: fewer such training images.
    """
    train, test = open_source(data, split="train"), open_source(data, split="test")
    made, wanted = folder / "made-from.json", {"train": train.fingerprint, "test": test.fingerprint, "count": labelled}
    wanted |= {"unlabelled": unlabelled} if unlabelled else {}
    if made.is_file() and read_json(made) == wanted:
        return folder
    has_label = labels_of(train) >= 0
    moved = np.concatenate(
        [_pick(np.flatnonzero(has_label), labelled, "--hold-out"),
         _pick(np.flatnonzero(~has_label), unlabelled, "--hold-out-unlabelled")]
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, ours=[path.name for path in folder.glob("*")]) as temporary:
        write_shard(temporary / "train-00000.tar", _samples(train, np.setdiff1d(np.arange(len(train)), moved)))
        write_shard(temporary / "test-00000.tar", _samples(test, np.arange(len(test))))
        write_shard(temporary / "test-00001.tar", _samples(train, np.sort(moved)))
        write_json(temporary / "classes.json", list(train.classes or ()))
        write_text(temporary / LICENCE_FILE, train.licence)
        write_json(temporary / made.name, wanted)
    return folder


def _pick(places: np.ndarray, count: int, option: str) -> np.ndarray:
    """`count` of `places` at random, the same in each run."""
    if count > len(places):
        raise SystemExit(f"{option} {count}: only {len(places)} such training images")
    return np.random.default_rng(0).permutation(places)[:count]


def _samples(source: ImageSource, places: np.ndarray) -> Iterator[tuple[str, bytes, int | None]]:
    """Samples for `write_shard`."""
    for place in map(int, places):
        buffer = io.BytesIO()
        source.read(place).save(buffer, format="PNG")
        yield f"{Path(source.key(place)).stem}.png", buffer.getvalue(), source.label(place)
