"""Calibration and judging images: real, deterministic, disjoint, enough of them, in the deployment's preprocessing."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from robx.errors import InputError
from robx.export.image_splits import SplitSizes, open_data, read_splits, require_disjoint
from robx.images.arrays import ArraySource
from robx.images.decode import preprocess
from robx.images.sources import open_source
from robx.records import Preprocessing

PRE = Preprocessing(size=40, crop=32)


def _source(name: str, seed: int, count: int) -> ArraySource:
    random = np.random.default_rng(seed)
    return ArraySource(
        name, random.integers(0, 256, (count, 40, 40, 3), dtype=np.uint8), random.integers(0, 4, count), tuple("abcd")
    )


def test_the_pixels_are_those_of_the_deployment(scenes: Path) -> None:
    train, test = open_data(scenes)
    splits = read_splits(train, test, PRE, sizes=SplitSizes(calibration=20, bank=30, least=20))
    source = open_source(scenes)
    own = {preprocess(source.read(i), PRE).tobytes() for i in range(len(source))}
    assert all(image.tobytes() in own for image in splits.calibration.normalised(PRE))


def test_images_are_the_same_every_time_and_on_one_side_only(scenes: Path) -> None:
    train, test = open_data(scenes)
    first, second = (read_splits(train, test, PRE, sizes=SplitSizes(calibration=20, least=20)) for _ in range(2))
    assert first.record() == second.record()
    assert not set(first.bank.digests) & set(first.judging.digests)
    assert first.record().fingerprint != first.record().judged_fingerprint
    assert first.bank.digests[:20] == first.calibration.digests


def test_one_source_is_split_and_duplicates_do_not_cross() -> None:
    source = _source("own", 0, 100)
    doubled = ArraySource("doubled", np.concatenate([source._pixels] * 2), None, None)
    splits = read_splits(doubled, None, PRE, sizes=SplitSizes(calibration=30, bank=60, least=30))
    assert len(splits.calibration) == 30 and len(splits.judging) >= 16
    assert not set(splits.bank.digests) & set(splits.judging.digests)
    assert len(set(splits.judging.digests)) == len(splits.judging)


def test_too_few_calibration_images_are_refused() -> None:
    with pytest.raises(InputError, match="299 different calibration images and at least 300"):
        read_splits(_source("small", 0, 299), _source("test", 1, 40), PRE)
    assert len(read_splits(_source("enough", 0, 300), _source("test", 1, 40), PRE).calibration) == 300


def test_too_few_judging_images_are_refused() -> None:
    with pytest.raises(InputError, match="to judge with"):
        read_splits(_source("train", 0, 300), _source("test", 1, 5), PRE)


def test_all_shortages_are_said_at_once_before_and_after_reading() -> None:
    both = r"^train has 20 different calibration images and at least 300 are needed, and test has 5 images to judge"
    few, test = _source("train", 0, 20), _source("test", 1, 5)
    with pytest.raises(InputError, match=both):
        read_splits(few, test, PRE)
    repeated = ArraySource("train", np.concatenate([few._pixels] * 20), None, None)  # only reading shows it
    again = ArraySource("test", np.concatenate([test._pixels] * 20), None, None)
    with pytest.raises(InputError, match=both):
        read_splits(repeated, again, PRE)


def test_judging_images_that_were_calibrated_on_are_refused() -> None:
    train = _source("train", 0, 320)
    other = _source("other", 1, 40)
    mixed = ArraySource("mixed", np.concatenate([other._pixels, train._pixels[:3]]), None, None)
    with pytest.raises(InputError, match="mixed shares 3 images"):
        read_splits(train, mixed, PRE)
    splits = read_splits(train, other, PRE)
    with pytest.raises(InputError, match="shares"):
        require_disjoint(splits.bank, splits.calibration, where="itself")


def test_unreadable_images_are_left_out(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    broken = sorted((folder / "train").rglob("*.png"))[0]
    broken.write_bytes(b"not a picture")
    train, test = open_data(folder)
    splits = read_splits(train, test, PRE, sizes=SplitSizes(calibration=20, bank=1000, least=20))
    assert len(splits.bank) + len(splits.screening) == len(train) - 1


def test_screening_images_are_no_ones_else() -> None:
    sizes = SplitSizes(bank=350, screening=50)
    splits = read_splits(_source("train", 0, 400), _source("test", 1, 40), PRE, sizes=sizes)
    assert (len(splits.calibration), len(splits.bank), len(splits.screening)) == (300, 367, 33)  # a third of 100
    assert not set(splits.screening.digests) & {*splits.bank.digests, *splits.judging.digests}
    assert not len(read_splits(_source("train", 0, 300), _source("test", 1, 40), PRE).screening)
    assert splits.calibration.digests == splits.bank.digests[:300]
    partly = _PartlyLabelled("partly", splits.bank.pixels.transpose(0, 2, 3, 1), splits.bank.labels, tuple("abcd"))
    shared = read_splits(partly, _source("test", 1, 40), PRE, sizes=SplitSizes(calibration=20, bank=300, least=20))
    assert 10 < (shared.screening.labels >= 0).sum() < (shared.bank.labels >= 0).sum()
    roomy = read_splits(_source("train", 0, 400), None, PRE, sizes=SplitSizes(calibration=20, bank=30, least=20))
    assert len(roomy.screening) > 16 and not set(roomy.screening.digests) & set(roomy.judging.digests)


def test_the_fingerprint_follows_pixels() -> None:
    first = read_splits(_source("a", 0, 300), _source("b", 1, 40), PRE)
    other = read_splits(_source("a", 0, 300), _source("b", 1, 40), dataclasses.replace(PRE, crop=24))
    assert first.record().fingerprint != other.record().fingerprint


class _PartlyLabelled(ArraySource):
    """A source of which every fifth image alone has a label."""

    def label(self, index: int) -> int | None:
        return super().label(index) if index % 5 == 0 else None


def test_labelled_images_are_read_first() -> None:
    """A probe fitted to the few labelled ones of many images would judge by less than it could."""
    whole = _source("partly", 3, 100)
    source = _PartlyLabelled("partly", whole._pixels, whole._labels, whole.classes)
    splits = read_splits(
        source, _source("test", 1, 40), PRE, sizes=SplitSizes(calibration=12, bank=30, screening=0, least=4)
    )
    assert (splits.bank.labels[:20] >= 0).all() and (splits.bank.labels[20:] == -1).all()


def test_judging_images_in_a_folder_of_two_splits_are_those_of_its_test_split(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "train", tmp_path / "alone" / "train")
    train, test = open_data(tmp_path / "alone", scenes)
    whole = open_data(scenes)
    assert whole[1] is not None and test is not None and test.fingerprint == whole[1].fingerprint
    assert train.classes == whole[0].classes and len(train) == len(whole[0])
