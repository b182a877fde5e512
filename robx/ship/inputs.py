"""The images that a plan reads: their identity, their number, and whether they have labels."""

from __future__ import annotations

import contextlib
from pathlib import Path

from robx.errors import NoSplit
from robx.images.protocol import ImageSource
from robx.images.sources import open_source


def fingerprint_images(data: Path) -> str:
    """The identity of all images of a data set: of its training split, or all images, and of its test split."""
    return " ".join(source.fingerprint for source in _splits(data) if source is not None)


def count_images(data: Path) -> tuple[int, int]:
    """The images of the training split, or all of them, and those of the test split (0 if there is none)."""
    train, test = (0 if source is None else len(source) for source in _splits(data))
    return train, test


def has_labels(data: Path) -> bool:
    """Whether the test images have classes; True where there is no test split, which evaluation refuses itself."""
    _, test = _splits(data)
    return test is None or test.classes is not None


def _splits(data: Path) -> tuple[ImageSource, ImageSource | None]:
    train = open_source(data)
    with contextlib.suppress(NoSplit):
        return train, open_source(data, split="test")
    return train, None
