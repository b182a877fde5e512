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
    yield "CMYK", _file(upright.convert("CMYK"), "JPEG", quality=95)
    yield "turned by EXIF", _file(upright, "JPEG", quality=95, exif=turned)
    yield "panorama", _file(Image.fromarray(wide), "PNG")
    yield "tall panorama", _file(Image.fromarray(wide.transpose(1, 0, 2).copy()), "PNG")
    yield "1 x 1", _file(Image.new("RGB", (1, 1), (9, 130, 240)), "PNG")


def _file(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()
