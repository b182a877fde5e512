"""Extraction: order, labels, unreadable images, and a cache that is right or not used."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from robx.errors import DeviceError, InputError, UnreadableImage
from robx.eval.datasets import features
from robx.eval.datasets.duplicates import look
from robx.eval.datasets.features import extract, extract_each, model_id
from robx.images.arrays import ArraySource
from robx.images.decode import crop_pixels, normalise_pixels, preprocess
from robx.images.sources import FolderSource
from robx.records import Preprocessing, Student

PRE = Preprocessing(size=18, crop=16)


class MeanColour:
    """A Session whose embedding is the image's mean colour, so that every row tells which image it is of."""

    def __init__(self, sha256="a" * 64, **facts):
        self.bundle = Student(
            timm_name="mean", width=3, preprocessing=PRE, sha256=sha256, teacher=None, data=None, recipe={}
        )
        self.sizes, self._facts = [], {"engine": "test", "version": "1", **facts}

    def run(self, images):
        self.sizes.append(len(images))
        return images.mean(axis=(2, 3))

    def facts(self):
        return self._facts


def arrays(n=150, seed=0, labels=True):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
    return ArraySource("random", pixels, np.arange(n) % 5 if labels else None, ("a", "b", "c", "d", "e"))


def expected(source, indices):
    return np.stack([preprocess(source.read(i), PRE).mean(axis=(1, 2)) for i in indices])


def test_rows_are_the_images_in_order():
    source, session = arrays(), MeanColour()
    found = extract(session, source, batch_size=64)
    np.testing.assert_allclose(found.features, expected(source, range(150)), atol=1e-6)
    np.testing.assert_array_equal(found.labels, np.arange(150) % 5)
    assert session.sizes == [64, 64, 22] and found.skipped == 0 and found.features.dtype == np.float32


class OnDevice(MeanColour):
    """A Session that normalises pixels itself, as one on a GPU does."""

    takes_pixels = True

    def run(self, images):
        assert images.dtype == np.uint8 and images.shape[1:] == (16, 16, 3)
        return super().run(np.stack([normalise_pixels(one, PRE) for one in images]))


def test_a_session_on_a_gpu_gets_pixels_if_it_would_normalise_them_alike():
    source = arrays(n=20)
    assert np.array_equal(extract(OnDevice(), source).features, extract(MeanColour(), source).features)
    both = extract_each([OnDevice(sha256="b" * 64), OnDevice()], source)
    assert np.array_equal(both[0].features, both[1].features)
    other = dataclasses.replace(PRE, mean=(0.5, 0.5, 0.5))
    with pytest.raises(AssertionError):  # its own mean is another: the images are normalised before
        extract(OnDevice(), source, other)
    mixed = extract_each([MeanColour(), MeanColour(sha256="b" * 64)], source)
    assert np.array_equal(mixed[0].looks, both[0].looks)


@pytest.fixture
def folder(tmp_path):
    for index in range(40):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (6 * index, 0, 0)).save(path)
    return tmp_path / "images"


def test_unreadable_images_are_skipped_and_counted(folder):
    for name in ("class0/004.png", "class1/033.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:30])
    source = FolderSource(folder)
    found = extract(MeanColour(), source, batch_size=7)
    assert found.skipped == 2 and len(found.features) == len(found.labels) == len(found.indices) == 38
    keys = [source.key(i) for i in found.indices]
    assert "class0/004.png" not in keys and keys == sorted(keys)
    np.testing.assert_allclose(found.features, expected(source, found.indices), atol=1e-6)
    np.testing.assert_array_equal(found.labels, [int(key[5]) for key in keys])


def test_a_set_that_is_mostly_unreadable_is_refused(folder):
    for path in sorted(folder.rglob("*.png"))[:15]:
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="15 of the 40 images of images cannot be read"):
        extract(MeanColour(), FolderSource(folder))
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 40"):
        extract(MeanColour(), FolderSource(folder))


def test_unlabelled_samples_say_so():
    assert (extract(MeanColour(), arrays(9, labels=False)).labels == -1).all()


def test_the_cache_answers_in_the_models_place(tmp_path):
    source = arrays()
    first = extract(MeanColour(), source, cache=tmp_path)
    again = MeanColour()
    second = extract(again, source, cache=tmp_path)
    assert again.sizes == []
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.indices, second.indices)
    np.testing.assert_array_equal(first.looks, second.looks)


@pytest.mark.parametrize(("of", "name", "other"), [("PIL", "__version__", "0"), ("features", "_CACHE_FORMAT", 0)])
def test_a_newer_decoder_or_format_makes_features_again(tmp_path, monkeypatch, of, name, other):
    source, again = arrays(20), MeanColour()
    with monkeypatch.context() as patch:
        patch.setattr(features.PIL if of == "PIL" else features, name, other)
        extract(MeanColour(), source, cache=tmp_path)
    extract(again, source, cache=tmp_path)
    assert sum(again.sizes) == 20


def test_every_image_leaves_its_own_look(folder):
    (folder / "class0" / "004.png").write_bytes(b"no image")
    source = FolderSource(folder)
    found = extract(MeanColour(), source, batch_size=7)
    expected = np.stack([look(crop_pixels(source.read(i), PRE)) for i in found.indices])
    np.testing.assert_array_equal(found.looks, expected)


@pytest.mark.parametrize(
    ("session", "source", "preprocessing"),
    [
        (MeanColour(sha256="b" * 64), arrays(), PRE),
        (MeanColour(version="2"), arrays(), PRE),
        (MeanColour(provider="cuda"), arrays(), PRE),
        (MeanColour(output="before_norm"), arrays(), PRE),
        (MeanColour(precision_hint="bf16"), arrays(), PRE),
        (MeanColour(), arrays(seed=1), PRE),
        (MeanColour(), arrays(), Preprocessing(size=20, crop=16)),
        (MeanColour(), arrays(), Preprocessing(size=18, crop=16, interpolation="bilinear")),
    ],
)
def test_the_cache_answers_for_nothing_else(tmp_path, session, source, preprocessing):
    extract(MeanColour(), arrays(), PRE, cache=tmp_path)
    session.sizes.clear()
    extract(session, source, preprocessing, cache=tmp_path)
    assert sum(session.sizes) == 150


def test_a_damaged_cache_is_made_again(tmp_path):
    source = arrays()
    whole = extract(MeanColour(), source, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    session = MeanColour()
    np.testing.assert_array_equal(extract(session, source, cache=tmp_path).features, whole.features)
    assert sum(session.sizes) == 150


def test_several_models_share_one_decoding(tmp_path):
    reads = []

    class Counted(ArraySource):
        def read(self, index, *, at_least=None):
            reads.append(index)
            return super().read(index)

    source = Counted("random", np.random.default_rng(0).integers(0, 256, (30, 20, 20, 3), dtype=np.uint8), None, None)
    first, second = MeanColour(), MeanColour(sha256="c" * 64)
    extract(first, source, cache=tmp_path)
    reads.clear()
    third = MeanColour(sha256="d" * 64)
    found = extract_each([first, second, third], source, cache=tmp_path, batch_size=8)
    assert sorted(reads) == list(range(30))
    assert sum(first.sizes) == 30 and sum(second.sizes) == sum(third.sizes) == 30  # the first came from the cache
    np.testing.assert_array_equal(found[0].features, found[2].features)


def test_progress_reaches_the_end():
    calls = []
    extract(MeanColour(), arrays(100), batch_size=32, progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == [32, 64, 96, 100]
    assert {total for _, total, _ in calls} == {100} and "random" in calls[0][2]


def test_an_answer_of_another_shape_is_the_models_fault():
    session = MeanColour()
    session.run = lambda images: images.mean(axis=(0, 2, 3))
    with pytest.raises(DeviceError, match="expected one embedding per image"):
        extract(session, arrays(10))


def test_a_student_is_known_by_its_weights():
    assert model_id(MeanColour().bundle) == "a" * 16


def test_images_that_were_written_again_are_embedded_again(folder, tmp_path):
    """Of the same size, and beyond what a fingerprint reads."""
    for path in folder.rglob("*.png"):
        Image.new("RGB", (20, 20), (200, 0, 0)).save(path.with_suffix(".bmp"))
        path.unlink()
    extract(MeanColour(), FolderSource(folder), cache=tmp_path / "cache")
    for path in folder.rglob("*.bmp"):
        Image.new("RGB", (20, 20), (0, 0, 200)).save(path)
        os.utime(path, ns=(1, 1))
    source = FolderSource(folder)
    source.fingerprint = "same"
    again = extract(MeanColour(), source, cache=tmp_path / "cache")
    np.testing.assert_allclose(again.features, expected(source, range(len(source))), atol=1e-6)


def test_what_the_disk_did_not_give_is_asked_for_again(folder, tmp_path, monkeypatch):
    source, real = FolderSource(folder), FolderSource.read

    def failing(self, index):
        if index < 3:
            raise UnreadableImage("cannot be read (Input/output error)")
        return real(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", failing)
        assert extract(MeanColour(), source, cache=tmp_path / "cache").skipped == 3
    assert extract(MeanColour(), source, cache=tmp_path / "cache").skipped == 0


def test_a_cache_that_cannot_be_written_costs_nothing(folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    found = extract(MeanColour(), FolderSource(folder), cache=tmp_path / "file" / "cache")
    assert len(found.features) == 40
