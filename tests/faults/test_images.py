"""Odd images, links, pipes and damaged shards in whole commands: converted, or counted against the limit."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from robx.errors import CorruptImage, InputError
from robx.images.decode import decode
from robx.images.shards import write_shard
from robx.images.sources import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
STUDENT = ("--teacher", "ema", "--student", "test_resnet", "--crop-size", 32, "--local-crop-size", 16)
TINY = (*STUDENT, "--local-crops", 1, "--batch-size", 8, "--epochs", 1, "--prototypes", 8, "--workers", 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header claims this many pixels and that contains none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def good_images() -> dict[str, bytes]:
    rgb, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    return {
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "grey_alpha.png": encoded(rgb.convert("LA")),
        "palette.png": encoded(rgb.convert("P"), transparency=0),
        "palette.gif": encoded(rgb.convert("P"), "GIF"),
        "sixteen.png": encoded(deep),
        "float.tiff": encoded(rgb.convert("F"), "TIFF"),
        "bits.png": encoded(rgb.convert("1")),
        "rotated.jpg": encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "png_named.jpg": encoded(rgb),
        "one.png": encoded(Image.new("RGB", (1, 1), "red")),
        "needle.png": encoded(Image.new("RGB", (30_000, 2), "blue")),
        "tower.png": encoded(Image.new("L", (2, 30_000), 7)),
    }


def bad_images() -> dict[str, bytes]:
    jpeg = encoded(Image.fromarray(PIXELS), "JPEG")
    return {
        "cut.jpg": jpeg[: len(jpeg) // 3],
        "zero.png": b"",
        "text.jpg": b"this is no image\n" * 9,
        "bomb.png": bomb_png(50_000, 50_000),
        "header.png": encoded(Image.fromarray(PIXELS))[:20],
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of odd images, bad ones, a pipe, and links: to nowhere, to a device, to a folder above."""
    root = tmp_path_factory.mktemp("odd") / "images"
    for part in ("train", "test"):
        for number, name in enumerate(("a", "b")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for file, data in (good_images() | bad_images()).items():
                (folder / f"{part}{number}{file}").write_bytes(data)  # other names: another set
            os.mkfifo(folder / "pipe.png")
            (folder / "nowhere.png").symlink_to("nothing.png")
            (folder / "device.png").symlink_to("/dev/zero")
            (folder / "above").symlink_to("..")
    return root


def test_a_whole_run_on_odd_images(odd: Path, tmp_path: Path, robx: Callable[..., Any]) -> None:
    command = ("distill", *TINY, "--data", odd, "--out", tmp_path / "run")
    refused = robx(*command)
    assert refused.exit_code == 2 and "cannot be decoded, more than --corrupt-budget" in refused.stderr
    assert not (tmp_path / "run" / "student.json").exists()
    assert "corrupt.txt" in refused.stderr and "cannot be decoded" in (tmp_path / "run" / "corrupt.txt").read_text()
    # 13 good, 5 bad, a pipe and two dead links in each class.
    learned = robx(*command, "--corrupt-budget", 0.5, "--fresh", "--json")
    assert learned.exit_code == 0, learned.output
    corrupt = (tmp_path / "run" / "corrupt.txt").read_text().splitlines()
    bad = {*(n for n in bad_images()), "pipe.png", "nowhere.png", "device.png"}
    assert corrupt and all(any(name in line for name in bad) for line in corrupt)
    judged = robx("eval", tmp_path / "run", "--data", odd, "--no-cache", "--json")
    assert judged.exit_code == 2 and "16 of the 42 images" in judged.stderr
    for path in odd.rglob("*"):
        if path.is_symlink() or path.is_fifo() or any(path.name.endswith(name) for name in bad_images()):
            path.unlink()
    judged = robx("eval", tmp_path / "run", "--data", odd, "--no-cache", "--json")
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout.splitlines()[-1])["data"]["images"] == 26


def test_truncated_missing_and_repeated_shards(tmp_path: Path, robx: Callable[..., Any]) -> None:
    data, picture = tmp_path / "shards", encoded(Image.fromarray(PIXELS))
    data.mkdir()
    for shard in range(4):
        write_shard(data / f"train-{shard}.tar", [(f"{shard}-{i}.png", picture, i % 2) for i in range(8)])
    write_shard(data / "train-5.tar", [("5-0.png", picture, 0)] * 2)  # 4 is missing; a key stands twice
    whole = (data / "train-1.tar").read_bytes()
    (data / "train-1.tar").write_bytes(whole[: len(whole) // 2])
    (data / "train-2.tar").write_bytes(b"garbage" * 1000)
    command = ("distill", *TINY, "--data", data, "--out", tmp_path / "run")
    refused = robx(*command)
    assert refused.exit_code == 2 and "images cannot be decoded" in refused.stderr
    learned = robx(*command, "--corrupt-budget", 0.9, "--fresh")
    assert learned.exit_code == 0, learned.output
    reasons = (tmp_path / "run" / "corrupt.txt").read_text()
    assert any(said in reasons for said in ("cut inside", "is damaged", "in the shard twice"))


@pytest.mark.parametrize("label", [b"99999999999999", b"-3", b"", b"\xff\x00", b"1" * 4000])
def test_an_invalid_label_leaves_the_image_unlabelled(tmp_path: Path, label: bytes) -> None:
    picture = encoded(Image.fromarray(PIXELS))
    members = {"x.png": picture, "x.cls": label, "y.png": picture, "y.CLS": b"1"}
    write_tar(tmp_path / "a.tar", members)
    source = open_source(tmp_path / "a.tar")
    assert source.classes == ("0", "1") and [source.label(i) for i in range(len(source))] == [None, 1]
    assert source.read(0).size == source.read(1).size == (30, 24)
    assert ("1 sample with an empty or invalid .cls" in source.note) == (label != b"-3")  # -1 and below mean none


def test_labels_may_be_class_names(tmp_path: Path) -> None:
    picture = encoded(Image.fromarray(PIXELS))
    labels = {"a": b"cat\n", "b": b"dog", "c": "café au lait".encode(), "d": b"7"}
    write_tar(
        tmp_path / "a.tar", {f"{k}.{s}": v for k, text in labels.items() for s, v in (("jpg", picture), ("cls", text))}
    )
    source = open_source(tmp_path)
    assert source.classes == ("7", "café au lait", "cat", "dog")
    assert [source.label(i) for i in range(4)] == [2, 3, 1, 0]


def test_one_label_of_many_digits_costs_no_memory(tmp_path: Path) -> None:
    picture = encoded(Image.fromarray(PIXELS))
    write_tar(tmp_path / "a.tar", {"a.png": picture, "a.cls": b"9999999", "b.png": picture, "b.cls": b"3"})
    source = open_source(tmp_path)
    assert source.classes == ("3", "9999999") and [source.label(i) for i in range(2)] == [1, 0]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_sample_with_several_images_is_refused_until_one_is_named(tmp_path: Path) -> None:
    red, mask = (encoded(Image.new("RGB", (4, 4), colour)) for colour in ((255, 0, 0), (9, 9, 9)))
    members = {"d/s0.rgb.png": red, "d/s0.mask.png": mask, "d/s0.cls": b"1", "d/s1.rgb.png": red, "d/s1.cls": b"0"}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=r"a\.tar: the sample 'd/s0' has several images \(mask\.png, rgb\.png\)"):
        open_source(tmp_path)
    for name in ("rgb.png", "rgb", ".RGB.png"):
        source = open_source(tmp_path, image_member=name)
        assert [source.key(i) for i in range(2)] == ["d/s0", "d/s1"] and [source.label(i) for i in range(2)] == [1, 0]
        assert source.read(0).getpixel((0, 0)) == (255, 0, 0)
    masks = open_source(tmp_path, image_member="mask")
    assert len(masks) == 1 and "skipped 1 sample without an image 'mask'" in masks.note
    with pytest.raises(InputError, match="no sample has an image 'depth'"):
        open_source(tmp_path, image_member="depth")
    write_tar(tmp_path / "a.tar", {"x.jpg": red, "x.png": mask, "x.cls": b"0"})
    with pytest.raises(InputError, match=r"several images \(jpg, png\)"):
        open_source(tmp_path)
    assert open_source(tmp_path, image_member="jpg").read(0).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("image", [True, False])
def test_a_sparse_member_hides_nothing_behind_it(tmp_path: Path, image: bool) -> None:
    """GNU tar's --sparse: the file's size is more than the tar holds of it."""
    picture = encoded(Image.fromarray(PIXELS))
    name = "hole.png" if image else "hole.bin"
    with (tmp_path / name).open("wb") as file:
        file.truncate(64 * 1024**2)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(picture)
    names = [name, *(f"{n}.png" for n in range(8))]
    for kind in ("gnu", "posix"):
        subprocess.run(["tar", "-S", f"--format={kind}", "-cf", f"{kind}.tar", *names], cwd=tmp_path, check=True)
        source = open_source(tmp_path / f"{kind}.tar")
        assert len(source) == 8 + image
        good = [i for i in range(len(source)) if source.key(i) != "hole"]
        assert len(good) == 8 and all(source.read(i).size == (30, 24) for i in good)
        if image:
            with pytest.raises(CorruptImage, match="sparse"):
                source.read(0)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """An extended header that claims 3 GB, which are a hole in the file."""
    picture, path = encoded(Image.fromarray(PIXELS)), tmp_path / "a.tar"
    write_shard(path, [("0.png", picture, None)])
    good = path.read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % 512)
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 3 * 1024**3
    with path.open("wb") as file:
        file.write(good + info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(len(good) + 512 + info.size + 1024)
    started = time.monotonic()
    source = open_source(path)
    assert time.monotonic() - started < 5
    assert source.read(0).size == (30, 24)
    with pytest.raises(CorruptImage, match="damaged"):
        source.read(1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "is empty: download it again"),
        (lambda path: path.write_bytes(gzip.compress(b"x" * 2000)), "gzip-compressed: unpack it with gunzip"),
        (lambda path: path.write_bytes(bz2.compress(b"x" * 2000)), "bzip2-compressed: unpack it"),
        (lambda path: path.write_bytes(lzma.compress(b"x" * 2000)), "xz-compressed: unpack it"),
        (lambda path: path.write_bytes(b"x" * 2000), "is damaged"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.write_bytes(bytes(10240)), "contains no images"),
    ],
    ids=["empty", "gzip", "bzip2", "xz", "text", "pipe", "nowhere", "no members"],
)
def test_files_that_are_not_tar_shards_are_refused_with_the_reason(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "a.tar")
    with pytest.raises(InputError, match=said):
        open_source(tmp_path)


def peak_of(data: bytes, tmp_path: Path) -> tuple[int, str]:
    """Megabytes that a process takes to decode `data`, and what came of it."""
    (tmp_path / "image").write_bytes(data)
    code = (
        "import sys\nfrom robx.errors import CorruptImage\nfrom robx.images.decode import decode\n"
        "try: said = str(decode(open(sys.argv[1], 'rb').read(), name='x').size)\n"
        "except CorruptImage as error: said = str(error)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(peak.split()[1]) // 1024, said)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "image"], capture_output=True, text=True, check=True)
    megabytes, _, said = done.stdout.strip().partition(" ")
    return int(megabytes), said


@pytest.mark.parametrize("mode", ["I;16", "P", "RGBA"])
def test_a_small_file_of_many_megapixels_is_refused_before_it_is_decoded(tmp_path: Path, mode: str) -> None:
    picture = encoded(Image.new(mode, (13_377, 13_377)), transparency=0) if mode == "P" else None
    picture = picture or encoded(Image.new(mode, (13_377, 13_377)))
    megabytes, said = peak_of(picture, tmp_path)
    assert said.startswith("x: 13377 x 13377 pixels is too large (at most 89 megapixels for PNG)")
    assert megabytes < 150


@pytest.mark.parametrize("mode", ["I;16", "P"])
def test_the_largest_image_that_is_decoded_stays_below_a_gigabyte(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"transparency": 0} if mode == "P" else {}
    megabytes, said = peak_of(encoded(Image.new(mode, (9_400, 9_500)), exif=exif, **more), tmp_path)
    assert said == "(9500, 9400)" and megabytes < 1000


def test_a_large_jpeg_is_decoded_at_half_size(tmp_path: Path) -> None:
    megabytes, said = peak_of(encoded(Image.new("RGB", (13_000, 13_000), "red"), "JPEG"), tmp_path)
    assert said == "(6500, 6500)" and megabytes < 1000


@pytest.mark.parametrize("name", ["cat.jpg", "cat.png", "cat.eps"])
def test_postscript_is_never_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(CorruptImage, match="unknown image format"):
        decode(postscript, name=name)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_shard_is_a_robx_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.tar"
    picture = encoded(Image.fromarray(PIXELS[:4, :4]))
    write_shard(path, [(f"{i}.png", picture, i) for i in range(3)])
    shard = bytearray(path.read_bytes()[: 512 * 14])
    for _ in range(data.draw(st.integers(1, 4))):
        header = 512 * data.draw(st.integers(0, 13))
        at = header + data.draw(st.integers(0, 511) | st.integers(124, 160))
        shard[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # a damaged header whose sum is right again
            shard[header + 148 : header + 156] = b" " * 8
            shard[header + 148 : header + 156] = b"%06o\0 " % sum(shard[header : header + 512])
    path.write_bytes(bytes(shard))
    try:
        source = open_source(path)
    except InputError:
        return
    for index in range(len(source)):
        assert source.label(index) is None or source.label(index) >= 0  # type: ignore[operator]
        try:
            source.read(index)
        except CorruptImage as error:
            assert str(error)


def test_a_gzip_bomb_is_not_unpacked_as_idx(tmp_path: Path) -> None:
    import resource

    head = b"\0\0\x08\x03" + struct.pack(">III", 2, 4, 4)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(64):
            file.write(bytes(8 * 1024**2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="download it again"):
        open_source(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
