"""Folders, shards and arrays are read in their published layouts, in a fixed order, with a fingerprint."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from robx.errors import ArtifactError, CorruptImage, InputError
from robx.images.arrays import ArraySource, read_idx
from robx.images.derived import DerivedSource
from robx.images.shards import write_shard
from robx.images.sources import data_info, labelled, labels_of, open_source
from robx.store.files import write_json


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


def test_an_image_folder_gives_classes_and_a_fixed_order(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/a.png", "cat/deep/c.png", "dog/notes.txt", ".hidden/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(_png(9))
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["cat/a.png", "cat/deep/c.png", "dog/b.png"]
    assert source.classes == ("cat", "dog")
    assert labels_of(source).tolist() == [0, 0, 1]
    assert source.read(0).getpixel((0, 0)) == (9, 0, 0)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(1))
    source = open_source(tmp_path)
    assert source.classes is None
    assert labels_of(source).tolist() == [-1]


def test_the_fingerprint_follows_the_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(1))
    first = open_source(tmp_path).fingerprint
    assert open_source(tmp_path).fingerprint == first
    (tmp_path / "b.png").write_bytes(_png(1))
    second = open_source(tmp_path).fingerprint
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({first, second, open_source(tmp_path).fingerprint}) == 3


def test_splits_are_found_under_their_usual_names(scenes: Path, tmp_path: Path) -> None:
    assert len(open_source(scenes)) == len(open_source(scenes, split="train")) == 64
    assert len(open_source(scenes, split="test")) == 32
    (tmp_path / "val" / "x").mkdir(parents=True)
    (tmp_path / "val" / "x" / "a.png").write_bytes(_png(1))
    assert len(open_source(tmp_path, split="test")) == 1
    with pytest.raises(InputError, match="has no train split"):
        open_source(tmp_path, split="train")


def test_shards_in_webdataset_layout(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [("k/a.png", _png(1), 1), ("b.png", _png(2), None)])
    write_shard(tmp_path / "test-0.tar", [("c.png", _png(3), 0)])
    write_json(tmp_path / "classes.json", ["zero", "one"])
    train, test = open_source(tmp_path, split="train"), open_source(tmp_path, split="test")
    assert [train.key(i) for i in range(2)] == ["k/a", "b"]
    assert labels_of(train).tolist() == [1, -1]
    assert train.classes == ("zero", "one")
    assert train.read(1).getpixel((0, 0)) == (2, 0, 0)
    assert len(test) == 1 and len(open_source(tmp_path)) == 2


@pytest.mark.parametrize(("names", "note"), [(["zero", "one"], ""), (["zero"], "2 or more names"), ({}, "2 or more")])
def test_names_that_do_not_fit_the_labels_of_shards_are_not_used_and_a_note_says_so(
    tmp_path: Path, names: object, note: str
) -> None:
    write_shard(tmp_path / "train-0.tar", [("a.png", _png(1), 1)])
    write_json(tmp_path / "classes.json", names)
    source = open_source(tmp_path)
    assert source.classes == (("0", "1") if note else ("zero", "one"))
    assert note in source.note and bool(note) == bool(source.note)


def test_every_source_reads_the_pixels_of_its_images(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(encoded, "JPEG")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(encoded.getvalue())
    (tmp_path / "folder" / "b.jpg").write_bytes(encoded.getvalue()[:600])
    write_shard(tmp_path / "one.tar", [("a.jpg", encoded.getvalue(), 0), ("b.jpg", encoded.getvalue()[:600], None)])
    folder, shard = open_source(tmp_path / "folder"), open_source(tmp_path / "one.tar")
    flipped = DerivedSource(folder, fingerprint="x", change=ImageOps.mirror)
    rows = ArraySource("rows", np.arange(128, dtype=np.uint8).reshape(2, 8, 8), None, None)
    for source in (folder, shard, labelled(shard), flipped, rows):
        for at_least in (None, 20):
            pixels = source.read_pixels(0, at_least=at_least)
            np.testing.assert_array_equal(pixels, np.asarray(source.read(0, at_least=at_least)))
    for source in (folder, shard, flipped):
        with pytest.raises(CorruptImage, match=r"b(\.jpg)?: cannot be decoded"):
            source.read_pixels(1)


def test_a_shard_that_tar_wrote_is_read(tmp_path: Path) -> None:
    """A second writer: the system's tar, with its own header dialect."""
    (tmp_path / "img.jpg").write_bytes(_png(5))
    (tmp_path / "img.cls").write_text("3\n")
    assert os.system(f"cd '{tmp_path}' && tar cf shard.tar img.jpg img.cls") == 0
    source = open_source(tmp_path / "shard.tar")
    assert (len(source), source.label(0)) == (1, 3)
    assert source.read(0).getpixel((0, 0)) == (5, 0, 0)


def test_a_cut_shard_keeps_its_good_samples_and_has_one_bad(tmp_path: Path) -> None:
    samples = [(f"{i}.png", _png(i), None) for i in range(20)]
    write_shard(tmp_path / "s.tar", samples)
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 1024 * 10 + 530])
    source = open_source(tmp_path / "s.tar")
    assert len(source) == 11
    assert [source.read(i).getpixel((0, 0)) for i in range(10)] == [(i, 0, 0) for i in range(10)]
    with pytest.raises(CorruptImage, match=r"s\.tar"):
        source.read(10)


def test_a_key_twice_in_one_shard_is_a_bad_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x.png", _png(1), None), ("x.png", _png(2), None)])
    source = open_source(tmp_path)
    found = [source.key(i) for i in range(len(source))]
    assert source.read(found.index("x")).getpixel((0, 0)) == (1, 0, 0) and len(found) == 2
    with pytest.raises(CorruptImage, match=r"a\.tar:x\.png: is in the shard twice"):
        source.read(1 - found.index("x"))


def test_keys_that_repeat_over_shards_get_the_shards_name(tmp_path: Path) -> None:
    for number, shard in enumerate("ab"):
        write_shard(tmp_path / f"{shard}.tar", [("0.png", _png(number), number), ("1.png", _png(number + 5), None)])
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(4)] == ["a/0", "a/1", "b/0", "b/1"]
    assert [source.read(i).getpixel((0, 0))[0] for i in range(4)] == [0, 5, 1, 6]  # type: ignore[index]
    assert labels_of(source).tolist() == [0, -1, 1, -1]


def test_links_in_a_shard_are_ignored(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x.png", _png(1), None)])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert len(open_source(tmp_path)) == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_as_published(tmp_path: Path, zipped: bool) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    for name, array in (("t10k-images-idx3-ubyte", pixels), ("t10k-labels-idx1-ubyte", np.array([7, 2], np.uint8))):
        data = _idx(array)
        (tmp_path / (name + (".gz" if zipped else ""))).write_bytes(gzip.compress(data) if zipped else data)
    source = open_source(tmp_path, split="test")
    assert labels_of(source).tolist() == [7, 2]
    assert np.array_equal(np.asarray(source.read(1))[..., 0], pixels[1])


@given(st.binary(max_size=64))
def test_bytes_that_are_not_idx_are_refused(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        try:
            array = read_idx(path)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert _idx(array) == data


def test_cifar_10_binary_as_published(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (3, 3073), dtype=np.uint8)
    rows[:, 0] = (3, 0, 1)
    rows.tofile(tmp_path / "data_batch_1.bin")
    rows[:1].tofile(tmp_path / "test_batch.bin")
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\nbird\ncat\n")
    source = open_source(tmp_path, split="train")
    assert labels_of(source).tolist() == [3, 0, 1]
    # Red plane first, row by row.
    assert source.read(0).getpixel((5, 2)) == tuple(rows[0, 1 + 1024 * c + 2 * 32 + 5] for c in range(3))
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="is not a CIFAR binary batch"):
        open_source(tmp_path, split="test")


@pytest.mark.parametrize("make", ["missing", "empty", "text", "file"])
def test_an_error_about_missing_images_names_the_path(tmp_path: Path, make: str) -> None:
    path = tmp_path / "data"
    if make != "missing":
        path.mkdir()
    if make == "text":
        (path / "a.txt").write_text("x")
    if make == "file":
        path = path / "a.txt"
        path.write_text("x")
    with pytest.raises(InputError, match=r"data"):
        open_source(path)


def test_the_labelled_view_contains_only_labelled_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x.png", _png(1), None), ("y.png", _png(2), 3), ("z.png", _png(3), 0)])
    source = open_source(tmp_path)
    view = labelled(source)
    assert [view.key(i) for i in range(len(view))] == ["y", "z"]
    assert labels_of(view).tolist() == [3, 0]
    assert view.read(0).getpixel((0, 0)) == (2, 0, 0)
    assert view.fingerprint != source.fingerprint
    assert labelled(view) is view


def test_an_unreadable_folder_is_refused_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(_png(1))
    real = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"b cannot be read \(Permission denied\)"):
        open_source(tmp_path)


def test_dangling_links_and_pipes_count_as_damaged_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x.png", _png(1), None)])
    (tmp_path / "b.tar").symlink_to("nowhere")
    os.mkfifo(tmp_path / "c.tar")
    source = open_source(tmp_path)
    assert len(source) == 3 and source.read(0).size == (4, 4)
    for index, said in ((1, "No such file"), (2, "not a regular file")):
        with pytest.raises(CorruptImage, match=said):
            source.read(index)


def test_empty_arrays_invalid_labels_and_pipes_are_refused(tmp_path: Path) -> None:
    for name, shape in (("train-images-idx3-ubyte", (0, 4, 4)), ("train-labels-idx1-ubyte", (0,))):
        (tmp_path / name).write_bytes(_idx(np.zeros(shape, np.uint8)))
    with pytest.raises(InputError, match="do not match"):
        open_source(tmp_path)
    cifar = tmp_path / "cifar"
    cifar.mkdir()
    np.full((1, 3073), 9, np.uint8).tofile(cifar / "data_batch_1.bin")
    (cifar / "batches.meta.txt").write_text("plane car")
    with pytest.raises(InputError, match=r"batches\.meta\.txt has no name for label 9 \(2 names\)"):
        open_source(cifar)
    pipe = tmp_path / "pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "train-images-idx3-ubyte")
    with pytest.raises(InputError, match="is not a regular file"):
        open_source(pipe)


@pytest.mark.parametrize(
    ("text", "licence"),
    [("CC0-1.0\n", "CC0-1.0"), ("  public domain  \nby many\n", "public domain"), ("", "unknown"), (None, "unknown")],
)
def test_the_licence_beside_the_images_goes_into_their_record(tmp_path: Path, text: str | None, licence: str) -> None:
    write_shard(tmp_path / "train-0.tar", [("x.png", _png(1), 0), ("y.png", _png(2), None)])
    before = open_source(tmp_path).fingerprint
    if text is not None:
        (tmp_path / "licence.txt").write_text(text)
    for source in (open_source(tmp_path), open_source(tmp_path / "train-0.tar"), labelled(open_source(tmp_path))):
        assert data_info(source).licence == licence
    assert open_source(tmp_path).fingerprint == before  # the images are the same
    (tmp_path / "licence.txt").write_bytes(b"x" * 100_000)
    with pytest.raises(ArtifactError, match="is larger than"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_licence_that_is_a_link_is_refused(tmp_path: Path, kind: str) -> None:
    """Its first line goes into every record that is made from the images."""
    (tmp_path / "secret").write_text("root:x:0:0\n")
    data = tmp_path / "data"
    data.mkdir()
    if kind == "shards":
        write_shard(data / "a.tar", [("x.png", _png(1), None)])
    else:
        (data / "x.png").write_bytes(_png(1))
    (data / "licence.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"licence\.txt is a link: replace it with the file itself"):
        open_source(data)


def test_a_huge_member_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.png")
    info.size = 4 * 1024**3
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(info.size + 2048)  # a hole: it takes no space
    source = open_source(tmp_path / "a.tar")
    with pytest.raises(CorruptImage, match="too many for an image"):
        source.read(0)


def test_images_with_the_same_names_and_sizes_are_distinguished(tmp_path: Path) -> None:
    """Uncompressed images: otherwise a cache of features would mix them up."""
    for name, level in (("dark", 10), ("light", 200)):
        for place in range(200):
            path = tmp_path / name / str(place % 2) / f"{place:03d}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (level, 0, place)).save(path)
    dark, light = (open_source(tmp_path / name) for name in ("dark", "light"))
    assert [path.stat().st_size for path in sorted((tmp_path / "dark").rglob("*.bmp"))] == [822] * 200
    assert dark.fingerprint != light.fingerprint
    assert dark.fingerprint == open_source(tmp_path / "dark").fingerprint


def test_a_tar_beside_the_folders_unpacked_from_it_is_not_a_shard(tmp_path: Path) -> None:
    """ImageNet's validation images in their own tar: training on them would be a leak that nobody sees."""
    for split in ("train", "val"):
        for place in range(3):
            path = tmp_path / split / "n01" / f"{split}{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_png(place))
    write_shard(tmp_path / "ILSVRC2012_img_val.tar", [(f"val{n}.png", _png(n), None) for n in range(2)])
    source = open_source(tmp_path)
    assert len(source) == 3 and source.key(0).endswith("train0.png")


def test_shards_with_the_same_names_and_sizes_are_distinguished(tmp_path: Path) -> None:
    for name, level in (("dark", 10), ("light", 200)):
        (tmp_path / name).mkdir()
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (level, 0, 0)).save(picture, "BMP")
        write_shard(tmp_path / name / "a.tar", [("0.bmp", picture.getvalue(), 1)])
    dark, light = (open_source(tmp_path / name) for name in ("dark", "light"))
    assert dark.fingerprint != light.fingerprint
