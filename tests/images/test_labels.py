"""Labels in a CSV file: which line belongs to which image."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from robx.errors import InputError
from robx.eval.datasets.splits import open_split
from robx.images.labels import read_labels
from robx.images.shards import write_shard
from robx.images.sources import labelled, labels_of, open_source


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in ("img/1.png", "img/2.png", "img/deep/3.png", "img/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    return tmp_path / "img"  # keys: 1.png, 2.png, 4.png, deep/3.png


def labels(data: Path, text: str) -> list[str | None]:
    """The class name of each image."""
    path = data.parent / "labels.csv"
    path.write_text(text)
    source = open_source(data, labels=path)
    assert source.classes is not None
    return [None if n < 0 else source.classes[n] for n in labels_of(source).tolist()]


@pytest.mark.parametrize(
    "text",
    [
        "1.png,cat\n2.png,dog\n4.png,cat\ndeep/3.png,dog\n",
        "path,label\n1.png,cat\n2.png,dog\n4.png,cat\ndeep/3.png,dog\n",
        "\ufeffImage,Class\r\n1.png,cat\r\n2.png,dog\r\n4.png,cat\r\n3.png,dog\r\n",
        "label;filename\ncat;1.png\ndog;2.png\ncat;4.png\ndog;deep\\3.png\n",
        "id\tsize\tbreed\n1\t9\tcat\n2\t9\tdog\n4\t9\tcat\n3\t9\tdog\n",
        "img/1.png,cat\nimg/2.png,dog\nimg/4.png,cat\nimg/deep/3.png,dog\n",
        "/data/x/1.png,cat\n/data/x/2.png,dog\n/data/x/4.png,cat\n/data/x/3.png,dog\n",
        '"1.png","cat"\n\n"2.png" , dog\n4.png,cat\n./deep/3.png,dog\nother/9.png,bird\n',
    ],
    ids=["plain", "header", "bom crlf", "semicolon", "tabs and stems", "above", "elsewhere", "quotes and others"],
)
def test_the_label_of_each_image_is_found(flat: Path, text: str) -> None:
    assert labels(flat, text) == ["cat", "dog", "cat", "dog"]


def test_images_without_a_line_are_counted_and_unlabelled(flat: Path) -> None:
    assert labels(flat, "1.png,cat\n2.png,\n4.png,dog\n") == ["cat", None, "dog", None]
    source = open_source(flat, labels=flat.parent / "labels.csv")
    assert source.note == "2 of 4 images have no label in labels.csv"
    assert len(labelled(source)) == 2


def test_names_are_numbered_by_the_whole_file(flat: Path, tmp_path: Path) -> None:
    """So that a training and a test folder with one file number alike; numbers sort as numbers."""
    path = tmp_path / "l.csv"
    path.write_text("1.png,10\n2.png,9\nelsewhere.png,2\n")
    assert open_source(flat, labels=path).classes == ("2", "9", "10")


def test_the_labels_are_in_the_fingerprint(flat: Path) -> None:
    path = flat.parent / "labels.csv"
    found = set()
    for text in ("1.png,a\n2.png,b\n", "1.png,b\n2.png,a\n", "1.png,a\n"):
        path.write_text(text)
        found.add(open_source(flat, labels=path).fingerprint)
    assert len(found | {open_source(flat).fingerprint}) == 4


def test_shards_take_labels_by_key(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_shard(tmp_path / "d" / "a.tar", [("x/1.png", png(), 5), ("x/2.png", png(), None)])
    (tmp_path / "l.csv").write_text("x/1.png,cat\nx/2,dog\n")
    source = open_source(tmp_path / "d", labels=tmp_path / "l.csv")
    assert source.classes == ("cat", "dog") and labels_of(source).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.png\n", "line 1: expected a path and a label, got '1.png'"),
        ("1.png,cat\n1.png,dog\n", "line 2: '1.png' has the labels 'cat' and 'dog'"),
        ("", "has no labels"),
        ("path,label\n", "has no labels"),
        ("a/b.png,cat\n", r"none of its 1 paths \('a/b.png', ...\) is an image of img"),
        ("1.png,\n", "none of its 1 paths"),
        ('"' + "x" * 200_000, "cannot be read as CSV"),
    ],
)
def test_a_bad_label_file_is_refused_with_the_line_number(flat: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        labels(flat, text)


@pytest.mark.parametrize("text", ["other/1.png,cat\nother/2.png,dog\n", "img/1.png,cat\nother/2.png,dog\n"])
def test_an_image_of_another_folder_lends_no_label_to_one_of_its_name(flat: Path, text: str) -> None:
    """As test/1.png and train/1.png, in a file that leaves the latter out."""
    source = flat.parent / "labels.csv"
    source.write_text(text)
    if text.startswith("other"):
        with pytest.raises(InputError, match="none of its 2 paths"):
            open_source(flat, labels=source)
    else:
        assert labels(flat, text) == ["cat", None, None, None]


def test_a_path_may_begin_above_the_folder(flat: Path) -> None:
    assert labels(flat, "data/img/1.png,cat\n/x/img/deep/3.png,dog\nimg/2.png,bird\n") == ["cat", "bird", None, "dog"]


def test_ambiguous_names_get_no_label(tmp_path: Path) -> None:
    for name in ("d/a/1.png", "d/b/1.png", "d/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    assert labels(tmp_path / "d", "1.png,cat\n2.png,dog\n") == [None, None, "dog"]


def test_odd_files(tmp_path: Path, flat: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match="is not a file"):
            read_labels(path)
    odd = os.fsdecode(b"caf\xe9.png")
    (flat / odd).write_bytes(png())
    (tmp_path / "l.csv").write_bytes(b"caf\xe9.png,cat\n1.png,dog\n")
    source = open_source(flat, labels=tmp_path / "l.csv")
    assert sorted(n for n in labels_of(source).tolist() if n >= 0) == [0, 1]


def test_lines_that_name_no_image_are_counted_with_the_first(flat: Path) -> None:
    path = flat.parent / "labels.csv"
    path.write_text("path,label\n1.png,cat\n2.png,dog\n4.png,cat\ndeep/3.png,dog\ntypo/0.jpg,dog\n")
    assert open_source(flat, labels=path).note == (
        "1 of 5 lines of labels.csv names no image of img (first: line 6, 'typo/0.jpg')"
    )
    path.write_text("1.png,cat\n2.png,dog\n4.png,cat\n3.png,dog\n")
    assert open_source(flat, labels=path).note == ""


def test_a_line_of_the_other_split_names_an_image(tmp_path: Path) -> None:
    for name in ("train/1.png", "train/2.png", "test/3.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(png())
    Image.new("RGB", (4, 4), "red").save(tmp_path / "d" / "test" / "3.png")
    path = tmp_path / "labels.csv"
    path.write_text("train/1.png,cat\ntrain/2.png,dog\ntest/3.png,cat\n")
    split = open_split(tmp_path / "d", None, labels=path)
    assert "names no image" not in split.bank.note + split.test.note
    path.write_text(path.read_text() + "test/4.png,cat\ntest/5.png,cat\n")
    split = open_split(tmp_path / "d", None, labels=path)
    assert "names no image" not in split.bank.note
    assert "2 of 5 lines of labels.csv name no image of train or test (first: line 4, 'test/4.png')" in split.test.note


def test_a_file_that_is_not_text_is_refused_as_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(png())
    with pytest.raises(InputError, match="is not a text file"):
        read_labels(tmp_path / "labels.csv")
