"""Decode one image and turn it into a model's input, with Pillow and numpy only."""

from __future__ import annotations

import contextlib
import io
import math
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

from robx.errors import CorruptImage, InputError, UnreadableImage
from robx.images.jpeg import jpeg_pixels
from robx.records import IMAGENET_MEAN as IMAGENET_MEAN
from robx.records import IMAGENET_STD as IMAGENET_STD
from robx.records import Bundle, Preprocessing, Student

# The formats that robx opens, and their usual suffixes. A fixed list, because Pillow also has formats that start other
# programs (EPS runs Ghostscript), whatever the file is called.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
}
# Formats of which a build of Pillow may lack the decoder.
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
# Image files that robx cannot read: they are counted and named, not taken for something else.
UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
    | {".psd", ".svg", ".eps", ".exr", ".hdr", ".dcm", ".nii", ".fits", ".ico", ".jxr", ".bpg", ".npy", ".pcx", ".sgi"}
)
FORMATS = tuple(name for name in _FORMATS if name not in _OPTIONAL or features.check(_OPTIONAL[name]))
IMAGE_SUFFIXES = frozenset(suffix for name in FORMATS for suffix in _FORMATS[name])
# Decoding stays below 1 GB. The first number is the one above which Pillow warns; the decoders of the other formats
# need more memory per pixel (WebP 16 bytes, JPEG 2000 20, AVIF 10).
MAX_PIXELS = 89_478_485
_MAX_PIXELS_OF = {"WEBP": 48_000_000, "JPEG2000": 40_000_000, "AVIF": 80_000_000}
# A larger JPEG is decoded at half size. A progressive one holds all its coefficients in memory meanwhile.
_MAX_JPEG_PIXELS, _MAX_PROGRESSIVE_PIXELS = 178_956_970, 130_000_000
_STRIP_PIXELS = 4_000_000  # converted at once
_WHITES = (1.0, 255.0, 65535.0)  # of images of floats and wide integers
_OVERSHOOT = 0.25  # a picture in 0..1 that was resampled may reach 1.1; one in 0..255 that ends there would be black
_16_BIT_FORMATS = ("PNG", "PPM")  # Pillow opens 16 bits of these as mode I
MAX_FILE_BYTES = 256 * 1024 * 1024
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Beyond this aspect ratio the resized image would be huge, and only its centre crop is used.
MAX_ASPECT = 20


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        CorruptImage: missing, unreadable, too large, or not a regular file (a pipe or a device may block for ever).
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CorruptImage(f"{path}: is not a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise CorruptImage(f"{path}: {found.st_size} bytes are too many for an image (at most {MAX_FILE_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror})") from error


def open_image(file: IO[bytes] | Path) -> Image.Image:
    """Open an image, not yet decoded, with Pillow, in one of robx's formats only.

    Raises:
        Whatever Pillow's parsers raise; `decode` makes one CorruptImage of it.
    """
    return Image.open(file, formats=FORMATS)


def decode(data: bytes, *, name: str, at_least: int | None = None) -> Image.Image:
    """Decode an encoded image to 8-bit RGB, upright.

    The EXIF rotation is applied, transparency is composited on white, 16 bits and floats are scaled to 8 bits, CMYK and
    palettes are converted. A JPEG with more than MAX_PIXELS is decoded at half size.

    With `at_least`, a JPEG is decoded at the smallest of 1/8, 1/4 and 1/2 of its size that leaves its shorter side that
    many pixels, by averaging within its blocks of 8 x 8: twice as fast at half the size, and five times at 1/8.

    Raises:
        CorruptImage: not an image, truncated, too many pixels, or pixels that are not finite; the message has `name`.
    """
    with _one_error(name):
        return _load(_open(data, name=name, at_least=at_least))


def decode_pixels(data: bytes, *, name: str, at_least: int | None = None) -> NDArray[np.uint8]:
    """The pixels of `decode`'s image, (H, W, 3); a common JPEG is decoded faster, see `robx.images.jpeg`.

    Raises:
        CorruptImage: as `decode` does.
    """
    with _one_error(name):
        image = _open(data, name=name, at_least=at_least)
        pixels = jpeg_pixels(data, image) if image.width * image.height <= MAX_PIXELS else None
        return np.asarray(_load(image)) if pixels is None else pixels


def _open(data: bytes, *, name: str, at_least: int | None) -> Image.Image:
    """Open an image within the limits, and choose the size that a JPEG is decoded at."""
    if len(data) > MAX_FILE_BYTES:
        raise CorruptImage(f"{name}: {len(data)} bytes are too many for an image (at most {MAX_FILE_BYTES})")
    image = open_image(io.BytesIO(data))
    scale = _least_scale(image, name)
    if at_least is not None and image.format in ("JPEG", "MPO"):
        scale = max(scale, next((scale for scale in (8, 4, 2) if min(image.size) >= scale * at_least), 1))
    if scale > 1:  # Pillow ignores a second call
        image.draft(None, (image.width // scale, image.height // scale))
    return image


def _load(image: Image.Image) -> Image.Image:
    """Decode an opened image with Pillow, upright and as RGB."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


@contextlib.contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn whatever decoding raises into a CorruptImage with `name`, and ignore Pillow's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its own message has the address of an object
        raise CorruptImage(f"{name}: cannot be decoded (unknown image format)") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: OSError, ValueError, struct.error
        raise CorruptImage(f"{name}: cannot be decoded ({error or type(error).__name__})") from error


def _least_scale(image: Image.Image, name: str) -> int:
    """What an opened image has to be reduced by, 1 or, for a large JPEG, 2; refuses one that needs too much memory."""
    pixels = image.width * image.height
    limit = _MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)
    if pixels <= limit:
        return 1
    if image.format in ("JPEG", "MPO"):
        limit = _MAX_PROGRESSIVE_PIXELS if image.info.get("progressive") else _MAX_JPEG_PIXELS
        if pixels <= limit:
            return 2
    raise CorruptImage(
        f"{name}: {image.width} x {image.height} pixels is too large (at most {limit / 1e6:.0f} megapixels for "
        f"{image.format}): shrink it first"
    )


def upright_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """A PIL image of any mode, decoded or not, as `decode` makes it of a file: upright RGB. `image` stays as it is.

    Raises:
        CorruptImage: it cannot be decoded or has no defined white; the message has `name`.
    """
    with _one_error(name):
        return to_rgb(ImageOps.exif_transpose(image), file_format=image.format)


def to_rgb(image: Image.Image, *, file_format: str | None = None) -> Image.Image:
    """An image of any Pillow mode as RGB; large images are converted in strips, to save memory.

    Args:
        image: the image.
        file_format: Pillow's name of the format that it was opened from, if the image itself has lost it.

    Raises:
        InputError: pixels of wide numbers that are not finite, or whose white is unknown; see `_white_of`.
    """
    if image.mode == "RGB":
        return image
    white = _white_of(image, file_format or image.format)
    if image.width * image.height <= _STRIP_PIXELS:
        return _strip_to_rgb(image, white)
    whole = Image.new("RGB", image.size)
    for box in _strips(image):
        whole.paste(_strip_to_rgb(image.crop(box), white), box)
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """The boxes of rows of an image that are converted at once."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _white_of(image: Image.Image, file_format: str | None) -> float:
    """The value of white of an image of wide numbers; 255 for others.

    16 bits have 65535, so a dark 16-bit image stays dark. Floats and 32 bits have no defined white: it is the smallest
    of 1 (floats only), 255 and 65535 that the brightest pixel exceeds by a quarter at most, as resampling overshoots.

    Raises:
        InputError: NaN or infinity, brighter than all of these, or further below 0 than a quarter of the brightest.
    """
    wide, integers = image.mode in ("I", "F"), image.mode.startswith("I")
    if not (wide or integers) or not image.width * image.height:
        return _WHITES[1]
    if image.mode != "F" and (not wide or file_format in _16_BIT_FORMATS):
        return _WHITES[2]
    extremes = np.array([(part.min(), part.max()) for part in (np.asarray(image.crop(box)) for box in _strips(image))])
    low, top = float(extremes[:, 0].min()), float(extremes[:, 1].max())  # NaN if a pixel is
    if not (math.isfinite(low) and math.isfinite(top)):
        raise InputError("some pixels are NaN or infinite: replace them in the file")
    if not -_OVERSHOOT * top <= low <= top <= (1 + _OVERSHOOT) * _WHITES[2]:
        raise InputError(f"pixels from {low:g} to {top:g}: scale them to 0..1, 0..255 or 0..65535")
    return next(white for white in _WHITES[integers:] if top <= (1 + _OVERSHOOT) * white)


def _strip_to_rgb(image: Image.Image, white: float) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(values * (255 / white), 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white_page = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white_page, layered).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize the shorter side to ``size`` and crop the centre ``crop`` square: torchvision's Resize and CenterCrop.

    With ``crop_width``: timm's ResizeKeepRatio and CenterCrop.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        left, top = (width - short) // 2, (height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    scaled = resized_size(image.size, preprocessing)
    image = image.resize(scaled, _FILTERS[preprocessing.interpolation])
    return image.crop(centre_box(scaled, preprocessing))


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) of an image of `size` (width, height) after the resize and before the crop, in pixels."""
    (crop_height, crop_width), (width, height), short = preprocessing.shape, size, preprocessing.size
    if crop_height == crop_width:
        long = int(short * max(size) / min(size))
        return (short, long) if width <= height else (long, short)
    scale = max(short / height, short * crop_width / crop_height / width)
    return max(crop_width, round(width * scale)), max(crop_height, round(height * scale))


def centre_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int, int, int]:
    """The crop (left, top, right, bottom) of a resized image of `size` (width, height)."""
    height, width = preprocessing.shape
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return left, top, left + width, top + height


def crop_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image resized and cropped for a model, uint8 (H, W, 3)."""
    return np.asarray(resize_and_crop(image, preprocessing))


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image as a model's input, float32 (3, H, W)."""
    return normalise_pixels(crop_pixels(image, preprocessing), preprocessing)


def host_input(image: Image.Image, model: Bundle | Student) -> np.ndarray:
    """What the host gives a Session of `model` for an RGB image, float32 (3, H, W).

    A bundle that resizes and crops by itself takes the whole image; all others take what `preprocess` makes of it.
    """
    inside = model.in_model if isinstance(model, Bundle) else None
    if inside is None or not inside.resize:
        return preprocess(image, model.preprocessing)
    return normalise_pixels(np.asarray(image), model.preprocessing)


def normalise_pixels(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Pixels 0..255 (H, W, 3), uint8, normalised: float32 (3, H, W)."""
    mean, std = (np.asarray(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray(((pixels.astype(np.float32) / np.float32(255) - mean) / std).transpose(2, 0, 1))


def renormalise(images: np.ndarray, given: Preprocessing, wanted: Preprocessing) -> np.ndarray:
    """Images (N, 3, H, W), float32, normalised as in `given`, as in `wanted` instead; the pixels stay the same."""
    if (given.mean, given.std) == (wanted.mean, wanted.std):
        return images
    old_mean, old_std, mean, std = (
        np.asarray(values, dtype=np.float32).reshape(1, 3, 1, 1)
        for values in (given.mean, given.std, wanted.mean, wanted.std)
    )
    found: np.ndarray = (images * old_std + old_mean - mean) / std
    return found
