"""Listing a folder of images: what is kept for the next start, and when it is no longer valid."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robx.images import listing
from robx.images.names import Names
from robx.images.sources import FolderSource, labels_of, open_source


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty images that count as many, in folders that have not changed for a while."""
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 20)
    root = tmp_path / "data"
    for number in range(30):
        path = root / f"c{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (100 + number))
    settle(root)
    return root


def settle(root: Path) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, ns=(1_000_000_000, time.time_ns() - 10_000_000_000))


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scans: list[str] = []
    real = listing._scan
    monkeypatch.setattr(listing, "_scan", lambda root, prefix, above: scans.append(prefix) or real(root, prefix, above))
    return scans


def test_names_are_the_strings_that_went_in() -> None:
    strings = ["", "a", "café", os.fsdecode(b"caf\xe9"), "x" * 300, "日本", ""]
    names = Names.of(strings)
    assert list(names) == strings and [names[i] for i in range(len(names))] == strings and names[-2] == "日本"
    assert list(Names.joined([names, Names.of([]), Names.of(["z"])])) == [*strings, "z"]
    assert list(Names.of([])) == list(Names.joined([])) == []
    with pytest.raises(IndexError):
        names[7]


def test_a_second_start_lists_nothing_and_finds_the_same(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FolderSource(large)
    assert len(list((large.parent / "cache" / "listings").glob("*.npz"))) == 1
    scans = count_scans(monkeypatch)
    again = FolderSource(large)
    assert not scans
    assert [again.key(i) for i in range(30)] == [first.key(i) for i in range(30)]
    assert (again.fingerprint, again.classes, again.note) == (first.fingerprint, first.classes, first.note)
    assert np.array_equal(labels_of(again), labels_of(first))


@pytest.mark.parametrize("change", ["add", "remove", "rename", "folder", "rewrite", "damage", "link"])
def test_a_changed_folder_is_listed_again(large: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    first = FolderSource(large).fingerprint
    path = large / "c0" / "00.png"
    match change:
        case "add":
            (large / "c0" / "new.png").write_bytes(b"x")
        case "remove":
            path.unlink()
        case "rename":
            path.rename(path.with_name("zz.png"))
        case "folder":
            (large / "c9").mkdir()
        case "rewrite":  # in place: no folder changes
            path.write_bytes(b"of another size")
        case "link":
            (large / "c0").rename(large.parent / "moved")
            (large / "c0").symlink_to(large.parent / "moved")
        case "damage":
            kept = next((large.parent / "cache" / "listings").glob("*.npz"))
            kept.write_bytes(kept.read_bytes()[:200])
    scans = count_scans(monkeypatch)
    found = FolderSource(large)
    assert scans
    assert (found.fingerprint == first) == (change in ("folder", "damage", "link"))
    monkeypatch.setattr(listing, "KEPT_FROM", 1000)
    monkeypatch.setenv("ROBX_CACHE", str(large.parent / "none"))
    assert found.fingerprint == FolderSource(large).fingerprint  # as listed without a cache


def test_contents_that_change_in_place_change_the_fingerprint(large: Path) -> None:
    first = FolderSource(large).fingerprint
    path = large / "c0" / "00.png"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert FolderSource(large).fingerprint != first


def test_a_folder_that_changed_just_now_is_not_kept(large: Path) -> None:
    (large / "c0" / "new.png").write_bytes(b"x")  # another file may come at the same time stamp
    FolderSource(large)
    assert not list((large.parent / "cache" / "listings").glob("*.npz"))


def test_a_cache_that_cannot_be_written_costs_nothing(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (large.parent / "file").write_text("")
    monkeypatch.setenv("ROBX_CACHE", str(large.parent / "file" / "cache"))
    assert len(FolderSource(large)) == 30


def test_small_folders_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(b"x")
    settle(tmp_path / "data")
    assert len(open_source(tmp_path / "data")) == 1 and not (tmp_path / "cache").exists()


def test_of_several_processes_one_asks_for_the_sizes(large: Path) -> None:
    code = (
        "import sys, pathlib\nfrom robx.images import listing\nfrom robx.images.sources import FolderSource\n"
        "listing.KEPT_FROM = 20\nreal, asked = listing.sizes_of, []\n"
        "listing.sizes_of = lambda *a: asked.append(1) or real(*a)\n"
        "source = FolderSource(pathlib.Path(sys.argv[1]))\nprint(len(asked), source.fingerprint)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, large], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [process.communicate()[0].split() for process in processes]
    assert sum(int(asked) for asked, _ in said) == 1 and len({fingerprint for _, fingerprint in said}) == 1


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "a").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for path in (data / "a" / "1.png", other / "2.png", other / "deep" / "3.png"):
        path.write_bytes(b"x")
    (data / "b").symlink_to(other)
    (other / "up").symlink_to(data)
    (data / "a" / "self").symlink_to(".")
    source = FolderSource(data)
    assert [source.key(i) for i in range(len(source))] == ["a/1.png", "b/2.png", "b/deep/3.png"]


@pytest.mark.parametrize("marker", [".robx-written", "manifest.json"])
@pytest.mark.parametrize("kept", [False, True])
def test_folders_that_robx_wrote_are_no_data(
    large: Path, monkeypatch: pytest.MonkeyPatch, marker: str, kept: bool
) -> None:
    """A bundle's golden image in an output folder among the images must not become training data."""
    if not kept:
        monkeypatch.setattr(listing, "KEPT_FROM", 1000)
    before = FolderSource(large)
    out = large / "c1" / "run"
    (out / "golden").mkdir(parents=True)
    (out / "golden/image.png").write_bytes(b"x")
    (out / marker).write_text('{\n  "format": "onnx",\n  "precision": "int8",\n  "bytes": 3}')
    settle(large)
    for _ in range(2):
        found = FolderSource(large)
        assert len(found) == 30 and found.fingerprint == before.fingerprint
        assert found.note == f"{large}: left out 1 folder that robx wrote (c1/run)"
    assert len(FolderSource(out)) == 1  # asked for by name
    (out / marker).write_text('{"format": "mine"}')
    if marker == "manifest.json":
        settle(large)
        os.utime(out.parent)
        assert len(FolderSource(large)) == 31


def test_an_output_folder_beside_the_splits_is_no_class(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(scenes / "train")
    (tmp_path / "run/golden").mkdir(parents=True)
    (tmp_path / "run/golden/image.png").write_bytes(b"x")
    (tmp_path / "run/.robx-written").touch()
    assert len(open_source(tmp_path)) == len(open_source(scenes / "train"))
