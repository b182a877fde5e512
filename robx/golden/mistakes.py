"""The common mistakes of a preprocessing written anew: what each makes of an image, and what to do about it.

Every mistake changes one stage of the way from an image to the model's input (resize and crop, order of the channels,
values, memory layout); swapped channels also come with a mistake of the values. The correct way is
`robx.images.decode.preprocess`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from robx.images.decode import centre_box, normalise_pixels, resize_and_crop, resized_size
from robx.records import IMAGENET_MEAN, IMAGENET_STD, Bundle, Preprocessing


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake, in words for the person who made it."""

    name: str
    said: str  # a sentence without its full stop, such as "red and blue are swapped"
    remedy: str  # an imperative, such as "give the channels as RGB"
    harmless: bool = False  # too small to matter to an application


_RESIZE = "resize with antialiasing, as Pillow does and cv2.resize does not"
_Found = Iterator[tuple[Mistake, np.ndarray]]


def variants(image: Image.Image, bundle: Bundle) -> _Found:
    """Each mistake and the input that it gives for an RGB image: float32 (3, H, W), as a Session of `bundle` takes it.

    A model that resizes by itself also gets images of other shapes than the correct one's.
    """
    inside, host = bundle.in_model, bundle.preprocessing
    resizes = inside is not None and inside.resize
    right = _array(image if resizes else resize_and_crop(image, host))
    geometries = _before_a_resizing_model(image, bundle.student.preprocessing) if resizes else _geometries(image, host)
    for mistake, pixels in geometries:
        yield mistake, normalise_pixels(pixels, host)
    takes = inside.channels if inside is not None else "RGB"
    swapped = Mistake(
        name="channels", said="red and blue are swapped", remedy=f"give the channels in the order {takes}"
    )
    yield swapped, normalise_pixels(right[..., ::-1], host)
    uint8 = inside is not None
    for plain, turned in zip(
        _values(right, host, uint8=uint8), _values(right[..., ::-1], host, uint8=uint8), strict=True
    ):
        mistake, values = plain
        yield mistake, values.transpose(2, 0, 1)
        both = Mistake(
            name=f"{swapped.name}, {mistake.name}",
            said=f"{swapped.said} and {mistake.said}",
            remedy=f"{swapped.remedy} and {mistake.remedy}",
        )
        yield both, turned[1].transpose(2, 0, 1)
    layout = "NCHW" if inside is None else inside.layout
    yield _other_layout(normalise_pixels(right, host), layout)
    yield from _raw_frames(right, host, layout=layout, takes=takes, uint8=uint8)


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def _geometries(image: Image.Image, pre: Preprocessing) -> _Found:
    """Mistakes of the resize and the crop, float32 (H, W, 3) with values 0..255."""
    yield from _other_resizes(image, pre)
    yield from _other_crops(image, pre)
    yield from _turned(_array(resize_and_crop(image, pre)))
    left, top, right, bottom = centre_box(scaled := resized_size(image.size, pre), pre)
    bands = [np.asarray(band.convert("F").resize(scaled, _filter(pre))) for band in image.split()]
    yield (
        Mistake(
            name="not rounded",
            said="the resized pixels are not rounded to whole numbers",
            remedy="round them to 8 bits for equality to the last bit",
            harmless=True,
        ),
        np.stack(bands, axis=-1)[top:bottom, left:right],
    )


def _other_resizes(image: Image.Image, pre: Preprocessing) -> _Found:
    """The right part of the image, resized with another kernel or without antialiasing."""
    box = centre_box(scaled := resized_size(image.size, pre), pre)
    for kernel in ("lanczos", "hamming"):
        yield (
            Mistake(
                name=kernel,
                said=f"the resize is {kernel} instead of {pre.interpolation}",
                remedy=f"resize with antialiased {pre.interpolation} interpolation",
            ),
            _array(image.resize(scaled, Image.Resampling[kernel.upper()]).crop(box)),
        )
    other = dataclasses.replace(pre, interpolation="bilinear" if pre.interpolation == "bicubic" else "bicubic")
    yield (
        Mistake(
            name="interpolation",
            said=f"the resize is {other.interpolation} instead of {pre.interpolation}",
            remedy=f"resize with antialiased {pre.interpolation} interpolation",
        ),
        _array(resize_and_crop(image, other)),
    )
    left, top, right, bottom = box
    for kernel in ("bilinear", "bicubic", "nearest"):
        said = (
            "the resize takes the nearest pixel" if kernel == "nearest" else f"the {kernel} resize has no antialiasing"
        )
        sampled = _sample(_array(image), scaled, kernel)[top:bottom, left:right]
        yield Mistake(name=f"no antialias, {kernel}", said=said, remedy=_RESIZE), np.rint(sampled)


def _other_crops(image: Image.Image, pre: Preprocessing) -> _Found:
    """Another part of the image, or all of it, in the model's shape."""
    height, width = pre.shape
    square, covered = height == width, f"{pre.size} x {round(pre.size * width / height)} pixels (height x width)"
    resize = f"resize the shorter side to {pre.size} pixels" if square else f"resize the image to cover {covered}"
    yield (
        Mistake(
            name="stretched",
            said=f"the whole image is squeezed to {width} x {height} pixels",
            remedy=f"keep the aspect ratio: {'resize the shorter side' if square else resize}, then crop the centre",
        ),
        _array(image.resize((width, height), _filter(pre))),
    )
    if pre.size != pre.crop:
        yield (
            Mistake(
                name="no margin",
                said=f"the shorter side is resized to {pre.crop} pixels instead of {pre.size}"
                if square
                else f"the image is resized to cover {height} x {width} instead of {covered}",
                remedy=f"{resize}, then crop the centre",
            ),
            _array(resize_and_crop(image, dataclasses.replace(pre, size=pre.crop))),
        )
    whole = image.resize(resized_size(image.size, pre), _filter(pre))
    yield (
        Mistake(name="corner crop", said="the upper left corner is cropped", remedy="crop the centre"),
        _array(whole.crop((0, 0, width, height))),
    )
    yield (
        Mistake(
            name="letterbox",
            said="the image is padded with black to the model's shape",
            remedy="crop the centre instead of padding",
        ),
        _array(_letterbox(image, (width, height), _filter(pre))),
    )


def _before_a_resizing_model(image: Image.Image, pre: Preprocessing) -> _Found:
    """What a host does needlessly before a model that resizes and crops by itself; `pre` is the model's own."""
    height, width = pre.shape
    remedy = "give the image as it was decoded: the model resizes and crops it"
    yield (
        Mistake(name="stretched", said=f"the image was squeezed to {width} x {height} pixels first", remedy=remedy),
        _array(image.resize((width, height), _filter(pre))),
    )
    yield (
        Mistake(name="cropped twice", said="the image was resized and cropped before the model", remedy=remedy),
        _array(resize_and_crop(image, pre)),
    )
    yield from _turned(_array(image))


def _turned(pixels: np.ndarray) -> _Found:
    """Pixels (H, W, 3) in another order, of the same shape."""
    yield (
        Mistake(name="upside down", said="the image is upside down", remedy="give its rows from top to bottom"),
        pixels[::-1],
    )
    yield Mistake(name="mirrored", said="the image is mirrored", remedy="do not flip it"), pixels[:, ::-1]
    yield (
        Mistake(
            name="transposed",
            said="height and width are swapped",
            remedy="give the pixels row by row, from left to right",
        ),
        np.ascontiguousarray(pixels.transpose(1, 0, 2)).reshape(pixels.shape),
    )


def _values(pixels: np.ndarray, pre: Preprocessing, *, uint8: bool) -> _Found:
    """Mistakes of the values, (H, W, 3); `pixels` are 0..255."""
    unit = pixels / np.float32(255)
    if uint8:
        yield (
            Mistake(name="scaled", said="the pixels are divided by 255", remedy="give them as they are, 0 to 255"),
            unit,
        )
        return
    mean, std = (np.asarray(values, dtype=np.float32) for values in (pre.mean, pre.std))
    right = (unit - mean) / std
    remedy = "compute (pixels / 255 - mean) / std, once"
    wrong = {
        "raw pixels": ("the pixels are 0..255, neither scaled nor normalised", pixels),
        "not scaled": ("the pixels are normalised without being divided by 255", (pixels - mean) / std),
        "not normalised": ("the pixels are 0..1, without the mean and the standard deviation", unit),
        "-1..1": ("the pixels are scaled to -1..1", 2 * unit - 1),
        "mean only": ("the mean is subtracted, but the result is not divided by the standard deviation", unit - mean),
        "std only": ("the pixels are divided by the standard deviation, but the mean is not subtracted", unit / std),
        "mean and std reversed": (
            "the mean and the standard deviation are in the order B, G, R",
            (unit - mean[::-1]) / std[::-1],
        ),
        "ImageNet": (
            "the mean and the standard deviation are ImageNet's, not the model's",
            (unit - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32),
        ),
        "normalised twice": ("the pixels are normalised twice", (right - mean) / std),
        "scaled twice": ("the pixels are divided by 255 twice", (unit / np.float32(255) - mean) / std),
    }
    for name, (said, values) in wrong.items():
        if not np.allclose(values, right, rtol=0, atol=1e-3):  # a model may be trained with mean and std .5
            yield Mistake(name=name, said=said, remedy=remedy), values


def _other_layout(images: np.ndarray, layout: str) -> tuple[Mistake, np.ndarray]:
    """The memory of one layout read as the other; (3, H, W) in and out."""
    _, height, width = images.shape
    other = "NHWC" if layout == "NCHW" else "NCHW"
    mistake = Mistake(
        name="layout", said=f"the tensor is {other} and is read as {layout}", remedy=f"give it as {layout}"
    )
    if layout == "NCHW":
        return mistake, np.ascontiguousarray(images.transpose(1, 2, 0)).reshape(3, height, width)
    return mistake, images.reshape(height, width, 3).transpose(2, 0, 1)


def _raw_frames(pixels: np.ndarray, pre: Preprocessing, *, layout: str, takes: str, uint8: bool) -> _Found:
    """Frames as cameras and OpenCV have them, pixels (H, W, 3) in the other layout, given to the model as they are."""
    if uint8:  # in the same order of channels it is `_other_layout`
        frames = {"BGR" if takes == "RGB" else "RGB": normalise_pixels(pixels[..., ::-1], pre)}
    else:
        frames = {"RGB": pixels.transpose(2, 0, 1), "BGR": pixels[..., ::-1].transpose(2, 0, 1)}
    for channels, values in frames.items():
        plain, wrong = _other_layout(values, layout)
        said = f"{plain.said}, with the channels in the order {channels}" + ("" if uint8 else " and pixels 0..255")
        remedy = "normalise the pixels and " if not uint8 else ""
        yield (
            Mistake(
                name=f"raw frame, {channels}",
                said=said,
                remedy=f"{remedy}give them as {takes}, {layout}",
            ),
            wrong,
        )


def _filter(pre: Preprocessing) -> Image.Resampling:
    return Image.Resampling.BICUBIC if pre.interpolation == "bicubic" else Image.Resampling.BILINEAR


def _letterbox(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """The whole image in the middle of a black one of `size` (width, height)."""
    scale = min(size[0] / image.width, size[1] / image.height)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resampling)
    padded = Image.new("RGB", size)
    padded.paste(small, ((size[0] - small.width) // 2, (size[1] - small.height) // 2))
    return padded


def _sample(pixels: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    """Resize (H, W, 3) to `size` (width, height) without antialiasing, as OpenCV and PyTorch do by default."""
    for axis, wanted in ((0, size[1]), (1, size[0])):
        pixels = np.moveaxis(np.tensordot(_weights(pixels.shape[axis], wanted, kernel), pixels, (1, axis)), 0, axis)
    clipped: np.ndarray = np.clip(pixels, 0, 255)
    return clipped


def _weights(length: int, wanted: int, kernel: str) -> np.ndarray:
    """How much each of `length` samples adds to each of `wanted` ones, float32 (wanted, length); edges are repeated."""
    weights, rows = np.zeros((wanted, length), dtype=np.float32), np.arange(wanted)
    if kernel == "nearest":
        weights[rows, (rows * length) // wanted] = 1
        return weights
    centres = (rows + 0.5) * length / wanted - 0.5
    first = np.floor(centres).astype(int)
    for tap in (0, 1) if kernel == "bilinear" else (-1, 0, 1, 2):
        distance = abs(centres - (first + tap))
        share = 1 - distance if kernel == "bilinear" else _cubic(distance)
        np.add.at(weights, (rows, np.clip(first + tap, 0, length - 1)), share)
    return weights


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel; OpenCV and PyTorch take a = -0.75."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    weights: np.ndarray = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return weights
