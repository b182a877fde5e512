"""Decoding one image, and making it a model's input. Pillow and numpy only: the device runs this too."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from robx.errors import CorruptImage, UnreadableImage
from robx.records import IMAGENET_MEAN as IMAGENET_MEAN
from robx.records import IMAGENET_STD as IMAGENET_STD
from robx.records import Preprocessing

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# 178 megapixels is Pillow's own bomb limit: more than any camera makes, and half a gigabyte once decoded.
MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 256 * 1024 * 1024
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Past this aspect ratio the resized image would be huge and its centre crop is all that is used.
_MAX_ASPECT = 20


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        CorruptImage: not there, unreadable, too large, or no regular file (reading a pipe or a device may never end).
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CorruptImage(f"{path}: is no regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise CorruptImage(f"{path}: {found.st_size} bytes is more than an image should have")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror})") from error


def decode(data: bytes, *, name: str) -> Image.Image:
    """Decode an encoded image to 8-bit RGB, upright.

    EXIF rotation is applied, transparency is laid on white, 16-bit is scaled to 8, CMYK and palettes are converted.

    Raises:
        CorruptImage: not an image, truncated, or more pixels than MAX_PIXELS; the message has `name`.
    """
    if len(data) > MAX_FILE_BYTES:
        raise CorruptImage(f"{name}: {len(data)} bytes is more than an image should have")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise CorruptImage(f"{name}: {image.width} x {image.height} pixels is a decompression bomb")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise CorruptImage(f"{name}: cannot be decoded (no image format that is known)") from error
    except (
        Exception
    ) as error:  # Pillow's plugins raise whatever their parser meets: OSError, ValueError, struct.error …
        raise CorruptImage(f"{name}: cannot be decoded ({error or type(error).__name__})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any Pillow mode as RGB."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        # A dark image of 16 bits is dark; wider numbers have no white, and the brightest has to tell the scale.
        brightest = 65535.0 if image.mode.startswith("I;16") else values.max(initial=0)
        scale = 255.0 / 65535.0 if brightest > 255 else 255.0 if image.mode == "F" and brightest <= 1 else 1.0
        return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Shorter side to ``size``, then the centre ``crop`` square, as torchvision's Resize and CenterCrop.

    With ``crop_width`` as timm's ResizeKeepRatio and CenterCrop.
    """
    crop_height, crop_width = preprocessing.shape
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > _MAX_ASPECT * short:
        left, top = (width - short) // 2, (height - short) // 2
        image = image.crop((left, top, left + short, top + short))
        width = height = long = short
    size = preprocessing.size
    if crop_height == crop_width:
        scaled = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    else:
        scale = max(size / height, size * crop_width / crop_height / width)
        scaled = (max(crop_width, round(width * scale)), max(crop_height, round(height * scale)))
    image = image.resize(scaled, _FILTERS[preprocessing.interpolation])
    left, top = round((scaled[0] - crop_width) / 2), round((scaled[1] - crop_height) / 2)
    return image.crop((left, top, left + crop_width, top + crop_height))


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image as the model's input, float32 (3, H, W)."""
    pixels = np.asarray(resize_and_crop(image, preprocessing), dtype=np.float32) / np.float32(255)
    mean = np.asarray(preprocessing.mean, dtype=np.float32)
    std = np.asarray(preprocessing.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


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
