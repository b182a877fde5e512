"""The demo's pictures: cleaned, deduplicated, split identically everywhere; and the fallback if none are available."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robx.demo import demo_data
from robx.demo.demo_data import pack_pictures, prepare_demo_data
from robx.images.sources import data_info, labels_of, open_source


def _quiet(done: int, total: int, note: str) -> None:
    assert done <= total and note


def _picture(path: Path, seed: int, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("art")
    for i in range(40):
        _picture(root / "animals" / f"{i}.png", i)
        _picture(root / "logos" / f"{i}.png", 1000 + i)
    for i in range(30):
        _picture(root / "food" / "fruit" / f"{i}.png", 2000 + i)
    with Image.open(root / "food" / "fruit" / "0.png") as image:
        image.save(root / "food" / "copy.png", compress_level=1)  # the same picture in another file
    Image.new("RGB", (50, 50), "white").save(root / "food" / "blank.png")
    (root / "food" / "cut.png").write_bytes((root / "food" / "fruit" / "1.png").read_bytes()[:80])
    for folder in ("animals", "food", "logos", "tools"):
        _picture(root / folder / "image-not-found.png", 31337)
    return root


def test_pictures_are_cleaned_and_split(art: Path, tmp_path: Path) -> None:
    pack_pictures(art, tmp_path / "packed", classes=("animals", "food"), progress=_quiet)
    train, test = (open_source(tmp_path / "packed", split=s) for s in ("train", "test"))
    assert len(train) + len(test) == 110  # without the copy, the blank, the truncated one and the one in every folder
    assert train.classes == ("animals", "food")
    labels = labels_of(train)
    assert (labels == -1).sum() == 40  # logos: training images only
    assert set(labels_of(test)) <= {0, 1}
    assert 10 <= len(test) <= 32
    assert not {train.key(i) for i in range(len(train))} & {test.key(i) for i in range(len(test))}
    assert train.read(0).size == (128, 128)


def test_packing_twice_gives_the_same_shards(art: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_pictures(art, tmp_path / name, classes=("animals", "food"), progress=_quiet)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["classes.json", "test-00000.tar", "train-00000.tar"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_any_source_scenes_are_rendered_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", _no_network)
    monkeypatch.setattr(demo_data, "write_scenes", _few_scenes)
    said: list[str] = []
    data = prepare_demo_data(tmp_path, say=said.append, progress=_quiet)
    assert data.name == "rendered scenes"
    assert [line.split(":")[0] for line in said] == ["clip art", "CIFAR-10"]
    assert "apt-get and dpkg-deb are missing" in said[0]
    assert len(open_source(data.folder, split="test")) == 2
    assert data_info(open_source(data.folder, split="train")).licence == "made by robx"


def test_shards_of_an_earlier_version_get_a_licence_file_and_are_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "clip-art-1"
    _write_scenes(folder, train=4, test=2, size=32)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    data = prepare_demo_data(tmp_path, say=pytest.fail, progress=_quiet)
    assert data.folder == folder and data_info(open_source(folder)).licence == "public domain"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before | {"licence.txt": b"public domain\n"}


def test_a_failed_download_falls_back_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 100)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", _no_network)
    monkeypatch.setattr(demo_data, "write_scenes", _few_scenes)
    said: list[str] = []
    prepare_demo_data(tmp_path, say=said.append, progress=_quiet)
    assert "apt-get download openclipart-png failed" in said[0]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == [".lock", "scenes-1"]


def _no_network(*args: object, **options: object) -> None:
    raise OSError("name or service not known")


_write_scenes = demo_data.write_scenes


def _few_scenes(folder: Path, **options: object) -> None:
    _write_scenes(folder, train=4, test=2, size=32)
