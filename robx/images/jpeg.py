"""JPEG pixels by simplejpeg, an optional package, in three quarters of Pillow's time and always equal to Pillow's.

Both decode with libjpeg-turbo; simplejpeg saves Pillow's detour through four bytes per pixel, so it is faster where an
array is wanted. Pixels must not depend on what is installed. So simplejpeg decodes an image only if

- its header is of a common kind that the tests compare with Pillow pixel by pixel (`_is_common`),
- this installation agrees with Pillow on generated images (`_agrees`, checked once per process), and
- libjpeg reports no error and no warning: Pillow decodes a damaged image, or raises its own error.
"""

from __future__ import annotations

import functools
import io
from importlib import import_module
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

PILLOW = f"Pillow {PIL.__version__}"
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_DCT = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; not lossless, arithmetic, hierarchical
# Sampling factors of the luma where those of both chroma components are 1 x 1: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1.
_LUMA = frozenset({(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)})
_ORIENTATION = 0x0112
_LEAST_SIDE = 8  # of fewer pixels several scalings, in eighths, have the same size, and libjpeg-turbo may take another


def jpeg_decoder() -> str:
    """The package, with its version, that decodes common JPEGs into arrays; if it is Pillow, the reason as well."""
    return _simplejpeg()[1]


def jpeg_pixels(data: bytes, image: Image.Image) -> NDArray[np.uint8] | None:
    """The upright RGB pixels (H, W, 3) of a common JPEG; None for anything else, which Pillow has to decode.

    Args:
        data: the file.
        image: the file as Pillow opened it, not yet loaded; after ``draft``, the pixels have the reduced size.
    """
    decoder = _simplejpeg()[0]
    if decoder is None or not _is_common(data, image):
        return None
    width, height = image.size
    try:
        pixels: NDArray[np.uint8] = decoder.decode_jpeg(data, min_height=height, min_width=width)
    except (ValueError, RuntimeError, MemoryError):  # also for a warning of libjpeg
        return None
    return pixels if pixels.shape == (height, width, 3) else None


@functools.cache
def _simplejpeg() -> tuple[Any, str]:
    """The module, if it is installed and agrees with Pillow, and the answer of `jpeg_decoder`."""
    try:
        found = import_module("simplejpeg")
    except ImportError:
        return None, f"{PILLOW} (faster with simplejpeg: pip install 'robx[jpeg]')"
    name = f"simplejpeg {getattr(found, '__version__', '')}".strip()
    if not _agrees(found):
        return None, f"{PILLOW} ({name} decodes to other pixels on this machine)"
    return found, name


def _agrees(decoder: Any) -> bool:
    """Whether it gives Pillow's pixels for generated images of every sampling, baseline and progressive, and size."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 35, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise[:3, :4]).resize((35, 24)))
    try:
        files = [
            decoder.encode_jpeg(pixels, quality=90, colorsubsampling=sampling)
            for pixels in (noise, smooth)
            for sampling in ("444", "422", "440", "420", "411", "gray")
        ]
        for progressive in (noise, smooth):
            file = io.BytesIO()
            Image.fromarray(progressive).save(file, "JPEG", progressive=True)
            files.append(file.getvalue())
        return all(_same(decoder, data, scale) for data in files for scale in (1, 2, 4, 8))
    except Exception:  # an old version, or a foreign package of that name
        return False


def _same(decoder: Any, data: bytes, scale: int) -> bool:
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    found = decoder.decode_jpeg(data, min_height=image.height, min_width=image.width)
    return np.array_equal(found, np.asarray(image.convert("RGB")))


def _is_common(data: bytes, image: Image.Image) -> bool:
    """Whether a file is an upright 8-bit JPEG, grey or YCbCr, of the kinds that the tests compare."""
    layers = getattr(image, "layer", ())  # (component, horizontal and vertical sampling, quantisation table) each
    samplings = [(layer[1], layer[2]) for layer in layers]
    if image.mode == "L":
        usual = len(samplings) == 1 and samplings[0] in _LUMA  # libjpeg ignores the factors of a single component
    else:
        usual = [layer[0] for layer in layers] == [1, 2, 3] and samplings[0] in _LUMA and set(samplings[1:]) == {(1, 1)}
    return (
        usual
        and image.format == "JPEG"
        and max(image.size) >= _LEAST_SIDE
        and ("adobe" not in image.info or image.info.get("adobe_transform") == 1)
        and image.getexif().get(_ORIENTATION, 1) == 1
        and _frame(data) in _HUFFMAN_DCT
    )


def _frame(data: bytes) -> int | None:
    """The marker of the first frame; None unless clean segments lead to it."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in _START_OF_FRAME:
            return marker
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
