"""Training and test splits are told apart by their usual names, and a split is never taken for a class."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from robx.errors import InputError, NoSplit
from robx.eval.datasets.splits import open_split
from robx.images.shards import write_shard
from robx.images.sources import open_part, open_source
from robx.images.splits import split_of_folder, split_of_shard


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())


def keys(root: Path, split: str | None = None) -> list[str]:
    source = open_source(root, split=split)
    return [source.key(i) for i in range(len(source))]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "valid"), ("train", "val"), ("train", "validation"), ("train", "dev"), ("train", "test"),
        ("Train", "Val"), ("TRAIN", "TEST"), ("training", "testing"), ("train2017", "val2017"),
        ("train_set", "test_set"), ("Training-Images", "Validation-Images"), ("trn", "tst"),
    ],
)  # fmt: skip
def test_training_never_reads_the_test_split(tmp_path: Path, train: str, test: str) -> None:
    fill(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/a/3.png")
    assert keys(tmp_path) == keys(tmp_path, "train") == ["a/1.png", "b/2.png"]
    assert keys(tmp_path, "test") == ["a/3.png"]
    note = open_source(tmp_path).note
    assert f"reading {tmp_path / train}, without {test}/" in note  # and says so


@pytest.mark.parametrize(
    ("train", "test"),
    [("x-train-0.tar", "x-validation-0.tar"), ("train-0.tar", "val-0.tar"), ("Training_00.tar", "Test_00.tar"),
     ("a.train.0.tar", "a.dev.0.tar")],
)  # fmt: skip
def test_shards_are_told_apart_by_a_word_of_their_names(tmp_path: Path, train: str, test: str) -> None:
    write_shard(tmp_path / train, [("a.png", png(), 0), ("b.png", png(), 1)])
    write_shard(tmp_path / test, [("c.png", png(), 0)])
    assert keys(tmp_path) == keys(tmp_path, "train") == ["a", "b"]
    assert keys(tmp_path, "test") == ["c"]
    assert f"reading 1 of 2 shards, without {test}" in open_source(tmp_path).note


def test_test_shards_are_not_read_with_unnamed_ones(tmp_path: Path) -> None:
    write_shard(tmp_path / "data-0.tar", [("a.png", png(), 0)])
    write_shard(tmp_path / "val-0.tar", [("b.png", png(), 0)])
    assert keys(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("val", "test"), ("trainee", None), ("validity", None), ("trains", None), ("testbed", None),
     ("train 2017", "train"), ("devices", None), ("test.images", "test"), ("2017", None), ("", None)],
)  # fmt: skip
def test_names_of_folders(name: str, split: str | None) -> None:
    assert split_of_folder(name) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-00000.tar", "train"), ("imagenet1k-validation-03.tar", "test"), ("trained-0.tar", None),
     ("train-val-0.tar", None), ("00000.tar", None), ("Testing.tar", "test")],
)  # fmt: skip
def test_names_of_shards(name: str, split: str | None) -> None:
    assert split_of_shard(name) == split


def test_a_training_folder_beside_other_images_is_never_one_class(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "bus/2.png", "car/3.png")
    with pytest.raises(InputError, match=r"the folder train beside bus, car: give .*train if it is a split"):
        open_source(tmp_path)
    assert keys(tmp_path, "train") == ["1.png"]


def test_one_split_alone_is_opened(tmp_path: Path) -> None:
    fill(tmp_path / "a", "train/x/1.png", "train/y/2.png")
    fill(tmp_path / "b", "Val/x/1.png", "Val/y/2.png")
    (tmp_path / "a" / "annotations").mkdir()
    (tmp_path / "a" / "annotations" / "x.json").write_text("{}")
    assert open_source(tmp_path / "a").classes == open_source(tmp_path / "b").classes == ("x", "y")
    assert open_part(tmp_path / "b", "train").classes == ("x", "y")


def test_a_class_may_be_called_test_or_valid(tmp_path: Path) -> None:
    fill(tmp_path, "valid/1.png", "broken/2.png")
    assert open_source(tmp_path).classes == ("broken", "valid")
    fill(tmp_path, "valid/broken/3.png")  # but a folder of classes is a split
    with pytest.raises(InputError, match="has the folder valid beside broken"):
        open_source(tmp_path)


def test_two_training_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "Training/2.png", "val/3.png")
    with pytest.raises(InputError, match=r"several training splits \(Training, train\)"):
        open_source(tmp_path)


def test_a_test_split_without_labels_gives_way_to_one_with_them(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "test/5.png")
    source = open_source(tmp_path, split="test")
    assert source.classes == ("a", "b") and len(source) == 2
    assert source.note == f"reading {tmp_path / 'val'}, because {tmp_path / 'test'} has no labels"
    fill(tmp_path, "test/a/6.png", "test/b/7.png")
    (tmp_path / "test" / "5.png").unlink()
    assert keys(tmp_path, "test") == ["a/6.png", "b/7.png"]


def test_a_split_that_is_not_there_is_its_own_error(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png")
    for split in ("train", "test"):
        with pytest.raises(NoSplit, match=f"has no {split} split"):
            open_source(tmp_path, split=split)
    assert len(open_part(tmp_path, "test")) == 1


def test_every_supported_suffix_is_read_and_others_are_counted(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    for suffix, kind in (
        (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"), (".png", "PNG"),
        (".dib", "BMP"), (".pnm", "PPM"), (".tga", "TGA"), (".webp", "WEBP"), (".tif", "TIFF"), (".qoi", "QOI"),
    ):  # fmt: skip
        picture.save(tmp_path / f"x{suffix}", kind)
    for name in ("a.heic", "b.HEIC", "c.cr2", "notes.txt", "labels.csv", "LICENSE", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert len(source) == 12 and all(source.read(i).size == (8, 8) for i in range(12))
    assert source.note == f"{tmp_path}: skipped 3 files that robx cannot read (2 .heic, 1 .cr2)"
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has no images .*, but 1 .heic"):
        open_source(only)


def test_a_stray_image_beside_the_class_folders_is_named_and_unlabelled(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{c}/{n}.png" for c in "ab" for n in range(10)), "stray.png")
    source = open_source(tmp_path)
    assert source.classes == ("a", "b") and [source.label(i) for i in (0, 19, 20)] == [0, 1, None]
    assert "1 image in" in source.note and "stray.png" in source.note and "without a label" in source.note
    fill(tmp_path, *(f"{n}.png" for n in range(9)))
    source = open_source(tmp_path)
    assert source.classes is None and "so that there are no labels" in source.note and "0.png" in source.note


@pytest.mark.parametrize(("read", "left"), [("val", "valid"), ("test", "val")])
def test_of_two_test_splits_the_one_that_is_not_read_is_named(tmp_path: Path, read: str, left: str) -> None:
    fill(tmp_path, "train/a/1.png", f"{read}/b/2.png", f"{left}/a/3.png", f"{left}/a/4.png")
    note = f"reading {tmp_path / read}, without {left}/"
    assert open_source(tmp_path, split="test").note == note
    with pytest.raises(InputError, match="has the class 'b'") as error:
        open_split(tmp_path, None)
    assert note in str(error.value)


def test_the_hint_at_test_is_given_only_where_it_helps(tmp_path: Path) -> None:
    fill(tmp_path, "data/train/a/1.png")
    with pytest.raises(InputError, match=r"has no test split.*give the test set with --test"):
        open_split(tmp_path / "data", None)
    with pytest.raises(InputError, match="does not exist") as error:
        open_split(tmp_path / "absent", None)
    assert "--test" not in str(error.value)
