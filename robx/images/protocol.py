"""What every source of images offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class ImageSource(Protocol):
    """Indexed images with optional labels."""

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str  # 16 hex digits; the same images in the same order have the same
    licence: str  # as licence.txt beside the images says, else "unknown"
    note: str  # one line for the user about what was left out or chosen; empty when there is nothing to say

    @property
    def stamp(self) -> str:
        """Changes when a file is rewritten, whatever it contains; empty where the fingerprint covers all contents."""

    def __len__(self) -> int:
        """The number of samples, including unreadable ones."""

    def key(self, index: int) -> str:
        """The sample's readable, unique name."""

    def label(self, index: int) -> int | None:
        """The index into `classes`, or None for an unlabelled sample."""

    def read(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """The decoded RGB image.

        With `at_least` pixels of the shorter side, a larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which
        is faster and gives other pixels; see `robx.images.decode.decode`.

        Raises:
            CorruptImage: it cannot be decoded.
        """

    def read_pixels(self, index: int, *, at_least: int | None = None) -> NDArray[np.uint8]:
        """The pixels of `read`'s image, (H, W, 3), often in less time; see `robx.images.decode.decode_pixels`."""
