"""Image files that are not plain RGB, which a port has to turn into what robx makes of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image


def odd_pictures() -> Iterator[tuple[str, bytes]]:
    """(what it is, the file), each with colours or values without any symmetry."""
    rng = np.random.default_rng(5)
    colours = rng.integers(0, 256, (50, 70, 4), dtype=np.uint8)
    rgba = Image.fromarray(colours)
    upright = Image.fromarray(colours[..., :3])
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = rng.integers(0, 256, (10, 400, 3), dtype=np.uint8)
    grey = np.linspace(300, 60_000, 50 * 70).reshape(50, 70)
    palette = upright.convert("P")
    yield "RGBA", _file(rgba, "PNG")
    yield "LA", _file(rgba.convert("LA"), "PNG")
    yield "palette with transparency", _file(palette, "PNG", transparency=palette.getpixel((3, 4)))
    yield "16-bit grey", _file(Image.fromarray(grey.astype(np.uint16)), "PNG")
    yield "32-bit grey", _file(Image.fromarray(grey.astype(np.int32)), "TIFF")
    yield "float grey", _file(Image.fromarray((grey / 65535).astype(np.float32)), "TIFF")
    overshooting = np.clip(grey / 65535 * 1.08 - 0.02, None, 1.05)  # as after a bicubic resize
    yield "float grey that overshoots 1", _file(Image.fromarray(overshooting.astype(np.float32)), "TIFF")
    yield "float grey that overshoots 255", _file(Image.fromarray((overshooting * 255).astype(np.float32)), "TIFF")
    yield "dark 16-bit PGM", _file(Image.fromarray((grey / 300).astype(np.uint16)), "PPM")
    yield "CMYK", _file(upright.convert("CMYK"), "JPEG", quality=95)
    yield "turned by EXIF", _file(upright, "JPEG", quality=95, exif=turned)
    yield "panorama", _file(Image.fromarray(wide), "PNG")
    yield "tall panorama", _file(Image.fromarray(wide.transpose(1, 0, 2).copy()), "PNG")
    yield "1 x 1", _file(Image.new("RGB", (1, 1), (9, 130, 240)), "PNG")


def pictures_without_white() -> Iterator[tuple[str, bytes]]:
    """(what it is, the file) of floats and integers that have no white that could be guessed: they are refused."""
    grey = np.linspace(0.05, 0.9, 50 * 70, dtype=np.float32).reshape(50, 70)
    for value in (np.nan, np.inf, -np.inf):
        for place in ((0, 0), (20, 30), (49, 69)):
            odd = grey.copy()
            odd[place] = value
            yield f"{value} at {place}", _file(Image.fromarray(odd), "TIFF")
    yield "-1 to 1", _file(Image.fromarray(2 * grey - 1), "TIFF")
    yield "normalised", _file(Image.fromarray((grey - 0.45) / 0.225), "TIFF")
    yield "Hounsfield units", _file(Image.fromarray((4000 * grey - 1024).astype(np.int32)), "TIFF")
    yield "31 bits", _file(Image.fromarray((grey * 2**31).astype(np.int32)), "TIFF")
    yield "only NaN", _file(Image.fromarray(np.full_like(grey, np.nan)), "TIFF")


def _file(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()
