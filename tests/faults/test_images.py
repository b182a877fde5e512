"""Odd images, links, pipes and damaged shards through whole commands: converted, or counted against the budget."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
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
    """A PNG that says so many pixels and holds none of them."""

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


def test_shards_that_are_cut_missing_or_say_things_twice(tmp_path: Path, robx: Callable[..., Any]) -> None:
    data, picture = tmp_path / "shards", encoded(Image.fromarray(PIXELS))
    data.mkdir()
    for shard in range(4):
        write_shard(data / f"train-{shard}.tar", [(f"{shard}-{i}.png", picture, i % 2) for i in range(8)])
    write_shard(data / "train-5.tar", [("0-0.png", picture, 0)])  # 4 is missing; a key of shard 0 once more
    whole = (data / "train-1.tar").read_bytes()
    (data / "train-1.tar").write_bytes(whole[: len(whole) // 2])
    (data / "train-2.tar").write_bytes(b"garbage" * 1000)
    command = ("distill", *TINY, "--data", data, "--out", tmp_path / "run")
    refused = robx(*command)
    assert refused.exit_code == 2 and "images cannot be decoded" in refused.stderr
    learned = robx(*command, "--corrupt-budget", 0.9, "--fresh")
    assert learned.exit_code == 0, learned.output
    reasons = (tmp_path / "run" / "corrupt.txt").read_text()
    assert any(said in reasons for said in ("it is cut", "it is damaged", "stands twice"))


@pytest.mark.parametrize("label", [b"99999999999999", b"-3", b"cat", b"", b"1" * 4000])
def test_a_wild_label_costs_its_own_sample_only(tmp_path: Path, label: bytes) -> None:
    picture = encoded(Image.fromarray(PIXELS))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("x.png", picture), ("x.cls", label), ("y.png", picture), ("y.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(tmp_path / "a.tar")
    assert source.classes == ("0", "1") and [source.label(i) for i in range(len(source))] == [None, 1]
    with pytest.raises(CorruptImage, match=r"'x.cls' holds no label"):
        source.read(0)
    assert source.read(1).size == (30, 24)


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


def test_a_small_file_that_unpacks_to_gigabytes_is_no_idx(tmp_path: Path) -> None:
    import gzip
    import resource

    head = b"\0\0\x08\x03" + struct.pack(">III", 2, 4, 4)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(64):
            file.write(bytes(8 * 1024**2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="fetch it again"):
        open_source(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
