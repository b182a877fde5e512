"""A source made from another one: some of its samples, with other labels, or with changed images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robx.images.protocol import ImageSource


@dataclass(frozen=True)
class LabelsFile:
    """Where labels come from that are not the source's own."""

    path: Path
    rows: int  # lines with a path and a label
    unmatched: dict[str, int]  # paths that name no image -> line
    images: str  # fingerprint of the images without these labels


class DerivedSource:
    """A view of `source`; what is not given is the source's own."""

    def __init__(
        self,
        source: ImageSource,
        *,
        fingerprint: str,
        chosen: np.ndarray | None = None,
        labels: Sequence[int | None] | None = None,
        classes: tuple[str, ...] | None = None,
        change: Callable[[Image.Image], Image.Image] | None = None,
        note: str | None = None,
        labels_file: LabelsFile | None = None,
    ) -> None:
        """Derive a source.

        Args:
            source: the images.
            fingerprint: of the result.
            chosen: indices of the samples to keep, in order.
            labels: of the kept samples, as indices into `classes`.
            classes: names of `labels`.
            change: applied to every image that is read, at its full size.
            note: one line for the user.
            labels_file: where `labels` come from.
        """
        self._source, self._chosen, self._labels, self._change = source, chosen, labels, change
        self.name, self.licence, self.fingerprint = source.name, source.licence, fingerprint
        self.classes = source.classes if labels is None else classes
        self.note = source.note if note is None else note
        self.labels_file = labels_file

    @property
    def stamp(self) -> str:
        """That of the whole source."""
        return self._source.stamp

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._source) if self._chosen is None else len(self._chosen)

    def _place(self, index: int) -> int:
        return index if self._chosen is None else int(self._chosen[index])

    def key(self, index: int) -> str:
        """The sample's name in the whole source."""
        return self._source.key(self._place(index))

    def label(self, index: int) -> int | None:
        """The sample's label."""
        return self._source.label(self._place(index)) if self._labels is None else self._labels[index]

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """The decoded RGB image."""
        if self._change is None:
            return self._source.read(self._place(index), at_least=at_least)
        return self._change(self._source.read(self._place(index)))

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """The same as an array (H, W, 3)."""
        if self._change is None:
            return self._source.read_pixels(self._place(index), at_least=at_least)
        return np.asarray(self.read(index))
