"""The images that a plan reads: their identity, their number, and whether they have labels."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from robx.errors import NoSplit
from robx.images.protocol import ImageSource
from robx.images.sources import open_source


@dataclass(frozen=True)
class Images:
    """A data set: its training split, or all images, and its test split, if there is one."""

    train: ImageSource
    test: ImageSource | None

    @classmethod
    def open(cls, data: Path, *, image_member: str | None = None) -> Images:
        """List the images of a data set; reads none."""
        train = open_source(data, image_member=image_member)
        with contextlib.suppress(NoSplit):
            return cls(train, open_source(data, split="test", image_member=image_member))
        return cls(train, None)

    @cached_property
    def fingerprint(self) -> str:
        """The identity of all images."""
        return " ".join(source.fingerprint for source in (self.train, self.test) if source is not None)

    @property
    def counts(self) -> tuple[int, int]:
        """Images to train on, and to test with (0 if there is no test split)."""
        return len(self.train), 0 if self.test is None else len(self.test)

    @property
    def split(self) -> bool:
        """Whether there are training and test images."""
        return self.test is not None and self.test.fingerprint != self.train.fingerprint

    @property
    def labelled(self) -> bool:
        """Whether the images have classes."""
        return all(source.classes is not None for source in (self.train, self.test) if source is not None)
