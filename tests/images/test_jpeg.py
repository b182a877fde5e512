"""simplejpeg decodes what it is proven to decode to Pillow's pixels, and nothing else."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robx.errors import CorruptImage
from robx.images import jpeg
from robx.images.decode import decode, decode_pixels
from robx.images.jpeg import PILLOW, jpeg_decoder, jpeg_pixels

simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: pip install 'robx[jpeg]'")

SAMPLINGS = ("444", "422", "440", "420", "411", "gray")


@pytest.fixture
def fresh() -> Iterator[None]:
    """The choice of the decoder is made anew in this test, and after it."""
    jpeg._simplejpeg.cache_clear()
    yield
    jpeg._simplejpeg.cache_clear()


def _image(width: int, height: int, *, seed: int = 0, coarse: int = 1) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (-(-height // coarse), -(-width // coarse), 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _encoded(image: Image.Image, sampling: str, quality: int = 90) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling=sampling)
    return encoded


def _direct(data: bytes) -> np.ndarray | None:
    """What simplejpeg is let decode; None where Pillow has to."""
    return jpeg_pixels(data, Image.open(io.BytesIO(data)))


@st.composite
def _common_jpegs(draw: st.DrawFn) -> bytes:
    """Grey and colour, every sampling, quality and odd size, baseline and progressive, with restart markers."""
    width, height = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    image = _image(width, height, seed=draw(st.integers(0, 2**16)), coarse=draw(st.sampled_from((1, 5, 40))))
    quality = draw(st.integers(1, 100))
    if draw(st.booleans()):
        return _encoded(image, draw(st.sampled_from(SAMPLINGS)), quality)
    if draw(st.integers(0, 4)) == 0:
        image = image.convert("L")
    options: dict[str, object] = {"quality": quality, "subsampling": draw(st.integers(0, 2))}
    options |= draw(st.sampled_from(({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2})))
    return _saved(image, **options)


@settings(max_examples=60, deadline=None)
@given(_common_jpegs(), st.sampled_from((None, 1, 5, 30)))
def test_the_pixels_of_a_common_jpeg_are_pillows_at_full_and_at_reduced_size(data: bytes, at_least: int | None) -> None:
    assert jpeg_decoder().startswith("simplejpeg ")
    expected = np.asarray(decode(data, name="x", at_least=at_least))
    assert (_direct(data) is not None) == (max(Image.open(io.BytesIO(data)).size) >= 8)
    np.testing.assert_array_equal(decode_pixels(data, name="x", at_least=at_least), expected)


@settings(max_examples=60, deadline=None)
@given(_common_jpegs(), st.data())
def test_a_damaged_jpeg_gives_pillows_pixels_or_pillows_error(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    damaged = damaged[: draw.draw(st.sampled_from((len(data), len(data) - 1, len(data) - 2, len(data) * 2 // 3)))]
    outcomes = []
    for one in (decode, decode_pixels):
        try:
            outcomes.append(np.asarray(one(bytes(damaged), name="x")))
        except CorruptImage as error:
            outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    np.testing.assert_array_equal(*outcomes)


def test_what_is_not_common_is_left_to_pillow() -> None:
    image = _image(40, 30)
    rotated = image.getexif()
    rotated[0x0112] = 6
    plain = _encoded(image, "420")
    lossless = plain.replace(b"\xff\xc0", b"\xff\xc3")
    left = {
        "CMYK": _saved(image.convert("CMYK")),
        "RGB in an Adobe file": _saved(image, keep_rgb=True, subsampling=0),
        "rotated": _saved(image, exif=rotated.tobytes()),
        "rotated in XMP": _saved(image, xmp=b'<x xmlns:tiff="" tiff:Orientation="6"/>'),
        "several images": _saved(image, "MPO", save_all=True, append_images=[image]),
        "PNG": _saved(image, "PNG"),
        "truncated": plain[:-20],
        "without its end": plain[:-2],
        "lossless": lossless,
    }
    for what, data in left.items():
        assert _direct(data) is None, what
    for what in set(left) - {"truncated", "without its end", "lossless"}:
        expected = np.asarray(decode(left[what], name="x"))
        np.testing.assert_array_equal(decode_pixels(left[what], name="x"), expected, err_msg=what)
    assert _direct(_saved(image, exif=Image.Exif().tobytes(), icc_profile=b"profile", comment=b"c")) is not None


def test_components_with_other_names_are_left_to_pillow() -> None:
    """libjpeg takes components called R, G, B for RGB where no other header tells."""
    data = bytearray(_encoded(_image(40, 30), "444"))
    at = data.index(b"\xff\xc0") + 10
    assert bytes(data[at : at + 9 : 3]) == b"\1\2\3"
    data[at : at + 9 : 3] = b"RGB"
    scan = data.index(b"\xff\xda") + 5
    data[scan : scan + 6 : 2] = b"RGB"
    assert _direct(bytes(data)) is None
    assert decode_pixels(bytes(data), name="x").shape == (30, 40, 3)


def test_a_large_jpeg_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robx.images.decode.MAX_PIXELS", 1000)
    asked: list[bytes] = []
    monkeypatch.setattr("robx.images.decode.jpeg_pixels", lambda data, image: asked.append(data))
    assert decode_pixels(_encoded(_image(100, 60), "420"), name="x").shape == (30, 50, 3)  # as `decode`: at half size
    decode_pixels(_encoded(_image(40, 25), "420"), name="x")
    assert [len(asked)] == [1]


def test_without_simplejpeg_pillow_decodes_and_the_decoders_name_says_how_to_get_it(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _encoded(_image(40, 30), "420")
    expected = decode_pixels(data, name="x")
    jpeg._simplejpeg.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert jpeg_decoder() == f"{PILLOW} (faster with simplejpeg: pip install 'robx[jpeg]')"
    assert _direct(data) is None
    np.testing.assert_array_equal(decode_pixels(data, name="x"), expected)


def _fast_and_wrong(data: bytes, **options: object) -> np.ndarray:
    found: np.ndarray = simplejpeg.decode_jpeg(data, fastupsample=True, **options)
    return found


@pytest.mark.parametrize(
    "installed",
    [
        SimpleNamespace(__version__="9.9", decode_jpeg=_fast_and_wrong, encode_jpeg=simplejpeg.encode_jpeg),
        SimpleNamespace(__version__="9.9", decode_jpeg=simplejpeg.decode_jpeg),
        ModuleType("simplejpeg"),
    ],
    ids=["other pixels", "another interface", "another package"],
)
def test_a_simplejpeg_that_does_not_agree_with_pillow_is_not_used(
    fresh: None, installed: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", installed)  # type: ignore[arg-type]
    assert jpeg_decoder().startswith(f"{PILLOW} (simplejpeg")
    assert jpeg_decoder().endswith("decodes to other pixels on this machine)")
    assert _direct(_encoded(_image(40, 30), "420")) is None
