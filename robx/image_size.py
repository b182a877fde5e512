"""Image sizes in pixels: the side of a square, or HEIGHTxWIDTH; the height always comes first."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

from robx.errors import InputError
from robx.records import Preprocessing

Shape = tuple[int, int]  # (height, width)
ImageSize = int | Shape  # the side of a square, or (height, width)


def parse_size(value: Any, *, name: str = "--size") -> Shape:
    """Height and width from 224, "224", "160x96" (height x width) or (160, 96).

    Args:
        value: what the user gave.
        name: of the option or key, for the error.

    Raises:
        InputError: `value` is none of these.
    """
    sides = value.lower().split("x") if isinstance(value, str) else value
    sides = [sides] if isinstance(sides, int) else sides
    if isinstance(sides, list | tuple) and len(sides) in (1, 2) and all(map(_is_side, sides)):
        return int(sides[0]), int(sides[-1])
    raise InputError(
        f"{name} must be a number of pixels or HEIGHTxWIDTH, got {reprlib.repr(value)}: give 224, or 160x96"
    )


def _is_side(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() and value.isdigit() and len(value) <= 9
    return isinstance(value, int) and not isinstance(value, bool)


def height_and_width(size: ImageSize) -> Shape:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def plain_size(shape: Shape) -> int | str:
    """A size as records, recipes and messages have it: 224 for a square, else "160x96"."""
    height, width = shape
    return height if height == width else f"{height}x{width}"


def at_size(preprocessing: Preprocessing, size: Shape | None) -> Preprocessing:
    """`preprocessing` with a crop of `size` (height, width) and the same relative margin around it; None: unchanged."""
    if size is None:
        return preprocessing
    height, width = size
    resized = max(height, round(height * preprocessing.size / preprocessing.crop))
    return dataclasses.replace(preprocessing, size=resized, crop=height, crop_width=None if width == height else width)


def usual_preprocessing(size: ImageSize) -> Preprocessing:
    """A network's evaluation at `size`: resized by 256 / 224 of it, then a centre crop, as published models are."""
    return at_size(Preprocessing(size=256, crop=224), height_and_width(size))
