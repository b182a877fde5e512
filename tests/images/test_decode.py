"""Every kind of image file becomes 8-bit RGB or one CorruptImage; preprocessing equals torchvision's."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from robx.errors import CorruptImage, InputError
from robx.images.decode import decode, preprocess, resize_and_crop, to_rgb, upright_rgb
from robx.images.transform import UprightRgb
from robx.records import Preprocessing
from tests.odd_pictures import pictures_without_white


def _encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def test_grey_palette_and_cmyk_become_rgb() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for data in (_encoded(red.convert("P")), _encoded(red.convert("CMYK"), "JPEG"), _encoded(red, "WEBP")):
        pixels = np.asarray(decode(data, name="x"))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4
    grey = decode(_encoded(Image.new("L", (8, 8), 77)), name="x")
    assert grey.getpixel((0, 0)) == (77, 77, 77)


def test_numbers_wider_than_a_byte_keep_their_scale() -> None:
    for values, want in (
        (np.full((4, 4), 200, dtype=np.uint16), 1),  # dark, and as dark as beside a bright one
        (np.full((4, 4), 300, dtype=np.uint16), 1),
        (np.full((4, 4), 0.5, dtype=np.float32), 128),
        (np.full((4, 4), 200, dtype=np.float32), 200),
        (np.array([[0.5, 1.05], [-0.02, 1.0]], dtype=np.float32), 128),  # a picture in 0..1, resampled
        (np.array([[200, 262], [-4, 255]], dtype=np.float32), 200),
        (np.array([[32768, 65535]], dtype=np.int32), 128),
    ):
        assert np.asarray(to_rgb(Image.fromarray(values)))[0, 0].tolist() == [want] * 3


def test_a_dark_16_bit_image_stays_dark_in_every_format() -> None:
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    for file_format in ("PNG", "TIFF", "PPM"):
        data = _encoded(dark, file_format)
        assert decode(data, name="x").getpixel((0, 0)) == (1, 1, 1)
        assert UprightRgb()(Image.open(io.BytesIO(data))).getpixel((0, 0)) == (1, 1, 1)


def test_pixels_that_have_no_white_are_refused_in_one_line() -> None:
    for what, data in pictures_without_white():
        with pytest.raises(CorruptImage, match=r"^x: cannot be decoded \((some pixels are NaN|pixels from)") as refused:
            decode(data, name="x")
        assert "\n" not in str(refused.value), what
        with pytest.raises(CorruptImage, match=r"^image 3: cannot be decoded"):
            upright_rgb(Image.open(io.BytesIO(data)), name="image 3")


def test_the_pixels_of_a_large_float_image_are_checked_in_every_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robx.images.decode._STRIP_PIXELS", 40)
    values = np.linspace(0, 1, 200, dtype=np.float32).reshape(20, 10)
    whole = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    np.testing.assert_array_equal(whole, np.rint(values.astype(np.float64) * 255))
    values[17, 3] = np.nan
    with pytest.raises(InputError, match="some pixels are NaN or infinite"):
        to_rgb(Image.fromarray(values))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert decode(_encoded(image), name="x").getpixel((0, 0)) == (128, 128, 128)


def test_transparency_is_composited_on_white() -> None:
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        assert decode(_encoded(Image.new(mode, (4, 4), colour)), name="x").getpixel((1, 1)) == (255, 255, 255)
    half = decode(_encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), name="x")
    assert half.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("at_least", "size"), [(None, (320, 200)), (101, (320, 200)), (100, (160, 100)), (25, (40, 25))]
)
def test_a_jpeg_is_decoded_at_the_smallest_size_that_suffices(at_least: int | None, size: tuple[int, int]) -> None:
    """At 1/2, 1/4 or 1/8: about the average of the full image's blocks. Other formats have no such decoding."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)).resize((320, 200))
    data = _encoded(smooth, "JPEG", quality=95)
    found = decode(data, name="x", at_least=at_least)
    assert found.size == size and found.mode == "RGB"
    reduced = np.asarray(decode(data, name="x").reduce(320 // size[0]), dtype=float)
    assert np.abs(np.asarray(found, dtype=float) - reduced).mean() < 1.5
    assert decode(_encoded(smooth), name="x", at_least=at_least).size == (320, 200)
    assert decode(_encoded(smooth.convert("CMYK"), "JPEG"), name="x", at_least=at_least).size == size
    with pytest.raises(CorruptImage, match="cut"):
        decode(data[: len(data) // 2], name="cut", at_least=at_least)


@pytest.mark.parametrize(("at_least", "size"), [(None, (160, 100)), (101, (160, 100)), (25, (40, 25))])
def test_a_jpeg_of_too_many_pixels_is_decoded_at_half_size_or_less(
    at_least: int | None, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robx.images.decode.MAX_PIXELS", 40_000)
    assert decode(_encoded(Image.new("RGB", (320, 200)), "JPEG"), name="x", at_least=at_least).size == size


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(_encoded(image, "JPEG", exif=exif.tobytes()), name="x").size == (10, 20)


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, I am text called .jpg",
        _encoded(_noise(64, 64))[:-200],
        _encoded(_noise(64, 64), "JPEG")[:400],
        _png_header(60_000, 60_000),
        _png_header(2**31 - 1, 1),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "bomb", "line bomb"],
)
def test_a_file_that_is_not_an_image_raises_one_error_with_its_name(data: bytes) -> None:
    with pytest.raises(CorruptImage, match=r"^some-name: ") as refused:
        decode(data, name="some-name")
    assert "object at 0x" not in str(refused.value)  # nobody can do anything with an address


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_decodes_or_is_corrupt_and_nothing_else(data: st.DataObject) -> None:
    good = bytearray(
        _encoded(_noise(16, 16), data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CorruptImage):
        assert decode(bytes(good), name="x").mode == "RGB"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (77, 77), (50, 300)])
def test_preprocessing_equals_torchvisions(
    width: int, height: int, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    image = _noise(width, height)
    ours = preprocess(image, Preprocessing(size=64, crop=56, interpolation=interpolation))
    reference = v2.Compose(
        [
            v2.Resize(64, interpolation=v2.InterpolationMode(interpolation)),
            v2.CenterCrop(56),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    np.testing.assert_allclose(ours, reference(image).numpy(), atol=2e-6)


def test_an_extreme_aspect_ratio_needs_little_memory() -> None:
    image = Image.new("RGB", (30_000, 2), "red")
    assert resize_and_crop(image, Preprocessing(size=256, crop=224)).size == (224, 224)
    assert resize_and_crop(Image.new("RGB", (1, 1)), Preprocessing(size=256, crop=224)).size == (224, 224)


@pytest.mark.parametrize("image", [(300, 200), (200, 300), (97, 97), (40, 500)])
@pytest.mark.parametrize(("crop", "size"), [((160, 96), 160), ((96, 160), 96), ((60, 64), 80)])
def test_a_crop_that_is_not_square_equals_timms(image: tuple[int, int], crop: tuple[int, int], size: int) -> None:
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio

    pixels = np.random.default_rng(0).integers(0, 256, (*image, 3), np.uint8)
    picture = Image.fromarray(pixels)
    pre = Preprocessing(size=size, crop=crop[0], crop_width=crop[1])
    scaled = (size, round(size * crop[1] / crop[0]))
    expected = CenterCropOrPad(crop)(ResizeKeepRatio(scaled, interpolation="bicubic")(picture))
    found = resize_and_crop(picture, pre)
    assert found.size == (crop[1], crop[0])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert preprocess(picture, pre).shape == (3, *crop)
