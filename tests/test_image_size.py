from __future__ import annotations

import dataclasses

import pytest

from robx.errors import InputError
from robx.image_size import at_size, parse_size, plain_size, usual_preprocessing
from robx.records import Preprocessing


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (224, (224, 224)),
        ("224", (224, 224)),
        ("160x96", (160, 96)),
        ("96X160", (96, 160)),
        ((160, 96), (160, 96)),
        ([160, 96], (160, 96)),
        ("096x96", (96, 96)),
    ],
)
def test_a_size_is_a_number_or_height_times_width(value: object, shape: tuple[int, int]) -> None:
    assert parse_size(value) == shape
    assert parse_size(plain_size(shape)) == shape


@pytest.mark.parametrize(
    "value", ["", "x", "1x2x3", "-1", "12.5", "²", "9" * 5000, 12.5, True, None, (1, 2, 3), (1.0, 2), [[1]], {}]
)
def test_another_size_is_refused_in_one_short_line(value: object) -> None:
    with pytest.raises(
        InputError, match=r"^--crop-size must be .* HEIGHTxWIDTH, got .*: give 224, or 160x96$"
    ) as found:
        parse_size(value, name="--crop-size")
    assert len(str(found.value)) < 160


def test_a_square_stays_a_number_in_records() -> None:
    assert plain_size((224, 224)) == 224
    assert plain_size((160, 96)) == "160x96"


def test_another_size_keeps_the_margin_of_the_crop() -> None:
    trained = Preprocessing(size=256, crop=224)
    assert at_size(trained, None) is trained
    assert at_size(trained, (112, 112)) == dataclasses.replace(trained, size=128, crop=112)
    wide = at_size(trained, (112, 224))
    assert (wide.size, wide.shape) == (128, (112, 224))


def test_the_usual_margin_is_256_over_224() -> None:
    assert usual_preprocessing(224) == Preprocessing(size=256, crop=224)
    assert usual_preprocessing(96) == Preprocessing(size=110, crop=96)
    assert usual_preprocessing((160, 96)) == Preprocessing(size=183, crop=160, crop_width=96)
